"""Tests of `converter.checkpoint`."""
