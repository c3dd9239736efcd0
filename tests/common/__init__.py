"""Tests of `converter.common`."""
