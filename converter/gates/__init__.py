"""Layers chosen by gates that are learned while all weights stay as they are.

`learning` holds the optimisers, which know gates and gradients only; `examples` gets the gradients
from a model; `state` is what travels between them and into files.
"""
