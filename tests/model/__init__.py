"""Tests of `converter.model`."""
