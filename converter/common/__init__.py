"""What every other package stands on: errors, crash-safe files, units, statistics, progress.

Only what at least two packages need goes here, and nothing that knows of attention, layers or
checkpoints.
"""
