# Copyright the hybridize authors. Licensed under the Apache License, Version 2.0.
"""The configuration of a hybrid model whose mask no native class computes.

It has a model type of its own, so that loading it without its code fails instead of computing
full attention.
"""

from transformers import Qwen3Config as BaseConfig


class HybridConfig(BaseConfig):
    """The base model's configuration; `layer_types` and `hybrid` are read by modeling_hybrid.py."""

    model_type = "hybrid_qwen3"
