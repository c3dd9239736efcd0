"""The model being converted, described without loading it: files, sizes, families, and the mask.

A new architecture is one file of `families/` and one line of its table.
"""
