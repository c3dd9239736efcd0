"""Turn a pretrained full-attention language model into a hybrid one, without training.

The straight line is recipe -> source -> scores -> plan -> checkpoint -> verification; each stage is
one function over frozen values. See `converter.pipeline` for the whole line.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
