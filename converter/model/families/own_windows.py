"""OLMo 3, EXAONE 4 and Gemma 3: most layers slide by the model's own window, the rest attend fully.

Only the latter can slide by ours. Their class reads more than the mask from `layer_types`: rotary
embeddings of another base, or none. So the plan stands elsewhere, and only masks change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from converter.model.dimensions import ModelDimensions
from converter.model.families.base import (
    Family,
    head_norms,
    llama_like_tensors,
    unlike_kinds,
    without,
)
from converter.model.families.dense import olmo2_tensors
from converter.model.families.stock_gguf import Config, Shapes
from converter.model.mask import FULL, OWN_SLIDING, SLIDING

# vLLM would take layers that the plan has slide for full ones.
NOT_IN_VLLM = "it reads from layer_types which layers slide, and this family more than that"
# What transformers takes where the config does not say.
_WINDOW = 4096
_EVERY = "sliding_window_pattern"


def own_kinds(config: Config, layers: int, every: int) -> list[str]:
    """The kinds of layers, as transformers spells them: every so-manieth full, if not said."""
    if config.get("layer_types") is not None:
        return list(config["layer_types"])
    every = config.get(_EVERY, every)
    return [SLIDING if (layer + 1) % every else FULL for layer in range(layers)]


def _own_windows(every: int) -> Callable[[Config, ModelDimensions], dict[str, Any]]:
    """The kinds of layers, of which every so-manieth attends fully unless the config says more."""

    def other_layers(config: Config, shape: ModelDimensions) -> dict[str, Any]:
        found = own_kinds(config, shape.layers, every)
        kinds = tuple(OWN_SLIDING if kind == SLIDING else kind for kind in found)
        return {"kinds": kinds, "own_window_tokens": config.get("sliding_window", _WINDOW) or 0}

    return other_layers


def _refuse(config: Config) -> str | None:
    every = config.get(_EVERY, 1)
    if config.get("layer_types") is None and (type(every) is not int or every < 1):
        return f"its {_EVERY} is {every!r}"
    kinds = own_kinds(config, config["num_hidden_layers"], 2)
    if unlike := unlike_kinds(config, kinds, (FULL, SLIDING)):
        return unlike
    if SLIDING in kinds and (config.get("sliding_window", _WINDOW) or 0) < 2:
        return "its sliding layers have no window (sliding_window)"
    if config.get("use_bidirectional_attention"):
        return "its attention looks forward, too (use_bidirectional_attention)"
    if config.get("attn_logit_softcapping") is not None:
        return "its attention caps its scores (attn_logit_softcapping)"
    return None


def _exaone4_tensors(_config: Config, shape: ModelDimensions, _layer: int) -> Shapes:
    """Norms after attention and MLP, and over each head's queries and keys."""
    tensors = without(llama_like_tensors(shape), "input_layernorm.")
    norm = {"post_feedforward_layernorm.weight": (shape.hidden,)}
    return tensors | norm | head_norms(shape)


def _gemma3_tensors(config: Config, shape: ModelDimensions, _layer: int) -> Shapes:
    """Norms before and after attention and MLP, and over each head's queries and keys."""
    bias = bool(config.get("attention_bias"))
    norms = {f"{side}_feedforward_layernorm.weight": (shape.hidden,) for side in ("pre", "post")}
    return llama_like_tensors(shape, qkv_bias=bias, o_bias=bias) | norms | head_norms(shape)


OLMO3 = Family(
    model_type="olmo3",
    title="OLMo 3",
    base_class="Olmo3",
    layer_tensors=olmo2_tensors,
    other_layers=_own_windows(4),
    refuse=_refuse,
    not_in_vllm=NOT_IN_VLLM,
)

EXAONE4 = Family(
    model_type="exaone4",
    title="EXAONE 4",
    base_class="Exaone4",
    layer_tensors=_exaone4_tensors,
    other_layers=_own_windows(4),
    refuse=_refuse,
    not_in_vllm=NOT_IN_VLLM,
)

GEMMA3 = Family(
    model_type="gemma3_text",
    title="Gemma 3 (text)",
    base_class="Gemma3",
    config_class="Gemma3TextConfig",
    layer_tensors=_gemma3_tensors,
    other_layers=_own_windows(6),
    refuse=_refuse,
    tied_by_default=True,
    not_in_vllm=NOT_IN_VLLM,
)
