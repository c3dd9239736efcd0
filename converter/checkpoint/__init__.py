"""The folder that we write: its format, writing and reading it, and the proof of its plan.

How a plan looks in config.json is `format.py`; what is proved is `verify/`. No weights are loaded
to write one.
"""
