"""From examples to scores: data, the selectors, what they ask of a model, and how choices compare.

A new way to choose layers is one file of `selectors/` and one line of its table.
"""
