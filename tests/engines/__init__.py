"""Tests of `converter.engines`."""
