"""Tests of `converter.cli`."""
