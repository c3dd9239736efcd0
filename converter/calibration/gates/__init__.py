"""Layers chosen by gates that are learned while all weights stay as they are.

`learning` holds the optimisers, which know gates and gradients only; `settings` how long they run.
`converter.calibration.selectors.gates` gives them the gradients of a model.
"""
