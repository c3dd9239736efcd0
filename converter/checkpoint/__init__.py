"""The folder that we write: its format, writing and reading it, and the proof of its plan."""
