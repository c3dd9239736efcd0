"""Tests of `converter.inference`."""
