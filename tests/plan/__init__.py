"""Tests of `converter.plan`."""
