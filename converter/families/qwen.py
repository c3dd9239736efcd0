"""Qwen2, Qwen2.5 and Qwen3: dense models whose own code honours `layer_types`."""

from __future__ import annotations

from typing import Any

from converter.families.base import (
    Config,
    Family,
    NativeForm,
    already_slides,
    llama_like_tensors,
)
from converter.shape import ModelShape

# Without use_sliding_window the configuration class sets the window to None. max_window_layers
# means nothing beside layer_types, but vLLM runs full attention silently when it equals the number
# of layers, as it does in most Qwen checkpoints, and refuses loudly when it is 0.
_WINDOW_KEYS = {"use_sliding_window": True, "max_window_layers": 0}


def _edit(config: Config, _shape: ModelShape) -> dict[str, Any]:
    return {**config, **_WINDOW_KEYS}


def _qwen2_tensors(_config: Config, shape: ModelShape) -> dict[str, tuple[int, ...]]:
    return llama_like_tensors(shape, qkv_bias=True)


def _qwen3_tensors(config: Config, shape: ModelShape) -> dict[str, tuple[int, ...]]:
    bias = bool(config.get("attention_bias", False))
    norms: dict[str, tuple[int, ...]] = {
        "self_attn.q_norm.weight": (shape.head_dim,),
        "self_attn.k_norm.weight": (shape.head_dim,),
    }
    return llama_like_tensors(shape, qkv_bias=bias, o_bias=bias) | norms


QWEN2 = Family(
    model_type="qwen2",
    title="Qwen2, Qwen2.5",
    base_class="Qwen2",
    native=NativeForm("qwen2", "Qwen2", "Qwen2ForCausalLM", _edit),
    custom_edit=_WINDOW_KEYS,
    layer_tensors=_qwen2_tensors,
    refuse=already_slides,
)

QWEN3 = Family(
    model_type="qwen3",
    title="Qwen3",
    base_class="Qwen3",
    native=NativeForm("qwen3", "Qwen3", "Qwen3ForCausalLM", _edit),
    custom_edit=_WINDOW_KEYS,
    layer_tensors=_qwen3_tensors,
    refuse=already_slides,
)
