"""Does a checkpoint compute its plan?

Nothing here may share attention code with what it proves.
"""
