"""Llama and Mistral: native in the mistral form, which transformers computes with Ministral.

A `model_type: mistral` config with `layer_types` is loaded as Ministral
(transformers models/auto/configuration_auto.py), whose weights have Llama's layout; mlx-lm and vLLM
read the same form. A `model_type: llama` config must never carry `layer_types`: transformers' masks
would stay full while its cache slides.
"""

from __future__ import annotations

from typing import Any

from converter.model.dimensions import ModelDimensions
from converter.model.families.base import (
    Family,
    NativeForm,
    plain_tensors,
    rope_theta_and_scaling,
    tensors_with_biases,
)
from converter.model.families.stock_gguf import LLAMA_NAMES, Config, StockGguf

# Keys of a Llama config that the mistral form does not know, or spells otherwise.
_DROPPED = ("attention_bias", "mlp_bias", "pretraining_tp", "rope_parameters", "rope_interleaved")


def _to_mistral(config: Config, shape: ModelDimensions) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in _DROPPED}
    return {
        **kept,
        # Without head_dim, Ministral fails; without the rest it would take its own defaults.
        "head_dim": shape.head_dim,
        "num_key_value_heads": shape.kv_heads,
        "hidden_act": config.get("hidden_act", "silu"),
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        **rope_theta_and_scaling(config),
    }


def _has_bias(config: Config) -> str | None:
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            return f"the mistral form has no biases and the source has them ({key})"
    return None


_MISTRAL_FORM = NativeForm(
    "mistral", "Ministral", "MistralForCausalLM", "4.57", _has_bias, _to_mistral
)

_STOCK_GGUF = StockGguf("llama", LLAMA_NAMES)

LLAMA = Family(
    model_type="llama",
    title="Llama",
    base_class="Llama",
    native=_MISTRAL_FORM,
    layer_tensors=tensors_with_biases,
    stock_gguf=_STOCK_GGUF,
    mlx_module="llama",
)

MISTRAL = Family(
    model_type="mistral",
    title="Mistral",
    base_class="Mistral",
    native=_MISTRAL_FORM,
    layer_tensors=plain_tensors,
    stock_gguf=_STOCK_GGUF,
    mlx_module="llama",
)
