"""Tests of `converter.publish`."""
