"""Calibration examples: made here, or read from the user's files."""
