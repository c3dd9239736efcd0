"""Does a checkpoint compute its plan?

`checks.py` asks in order; `candidate.py` runs the checkpoint as a stranger would. Nothing here may
share attention code with what it proves: `reference.py` is the source under a brute-force mask.
"""
