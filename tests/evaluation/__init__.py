"""Tests of `converter.evaluation`."""
