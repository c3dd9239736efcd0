# Copyright the hybridize authors. Licensed under the Apache License, Version 2.0.
"""The configuration of a hybrid model whose mask no native class computes.

It has a model type of its own, so that loading it without its code fails instead of computing
full attention.
"""

import transformers
from packaging.version import Version

if Version(transformers.__version__) < Version("5.4"):
    raise ImportError(
        "this checkpoint's code needs transformers 5.4 or newer, not "
        f"{transformers.__version__}: pip install -U transformers"
    )

from transformers import Qwen3Config as BaseConfig
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)


class HybridConfig(BaseConfig):
    """The base model's configuration; `layer_types` and `hybrid` are read by modeling_hybrid.py."""

    model_type = "hybrid_qwen3"


# Some families store weights in another layout than their class holds (experts one by one).
# transformers finds the conversion by model type, so ours needs the base's.
_conversion = get_checkpoint_conversion_mapping(BaseConfig.model_type)
if _conversion is not None:
    register_checkpoint_conversion_mapping(HybridConfig.model_type, _conversion, overwrite=True)
