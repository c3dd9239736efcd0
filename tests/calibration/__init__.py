"""Tests of `converter.calibration`."""
