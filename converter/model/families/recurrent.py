"""Qwen3.5, 3.6 and Qwen3-Next: most layers are recurrent (gated delta net), some attend fully.

Only the layers that attend fully can slide. Their attention is gated, and rotates a part of each
head; no plan changes that.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from converter.model.dimensions import ModelDimensions, bytes_per_value
from converter.model.families.base import (
    Family,
    head_norms,
    llama_like_tensors,
    unlike_kinds,
    without,
)
from converter.model.families.experts import (
    EXACTLY,
    expert_tensors,
    mlp_tensors,
    pack_experts,
    packed_shapes,
    unknown_experts,
)
from converter.model.families.stock_gguf import Config, Shapes
from converter.model.mask import FULL, LINEAR

# Sizes of a recurrent layer, with what transformers takes where the config does not say.
_SIZES = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
_NOT_IN_VLLM = "it runs transformers' code for layers with attention only"
# The recurrent state is in float32, whatever the weights are in.
_STATE_BYTES = 4


def _size(config: Config, key: str) -> int:
    value: int = config.get(key, _SIZES[key])
    return value


def _widths(config: Config) -> tuple[int, int]:
    """Channels of all keys, and of all values, of a recurrent layer."""
    keys = _size(config, "linear_num_key_heads") * _size(config, "linear_key_head_dim")
    values = _size(config, "linear_num_value_heads") * _size(config, "linear_value_head_dim")
    return keys, values


def _other_layers(config: Config, shape: ModelDimensions) -> dict[str, Any]:
    every = config.get("full_attention_interval", 4)
    kinds = config.get("layer_types") or [
        LINEAR if (layer + 1) % every else FULL for layer in range(shape.layers)
    ]
    keys, values = _widths(config)
    state = values * _size(config, "linear_key_head_dim") * _STATE_BYTES
    inputs = (2 * keys + values) * _size(config, "linear_conv_kernel_dim")
    return {"kinds": tuple(kinds), "state_bytes": state + inputs * bytes_per_value(config)}


def _refuse(config: Config) -> str | None:
    for key in (*_SIZES, "full_attention_interval"):
        if type(config.get(key, 1)) is not int or config.get(key, 1) < 1:
            return f"its {key} is {config[key]!r}"
    kinds = config.get("layer_types")
    return None if kinds is None else unlike_kinds(config, kinds, (FULL, LINEAR))


def _attention(config: Config, shape: ModelDimensions) -> Shapes:
    """Full attention, with queries and their gates in one matrix; and a dense MLP."""
    biased, gated = bool(config.get("attention_bias", False)), 2 * shape.heads * shape.head_dim
    tensors = llama_like_tensors(shape, qkv_bias=biased, o_bias=biased)
    tensors["self_attn.q_proj.weight"] = (gated, shape.hidden)
    if biased:
        tensors["self_attn.q_proj.bias"] = (gated,)
    return tensors | head_norms(shape)


def _recurrent(config: Config, shape: ModelDimensions, *, joined: bool = False) -> Shapes:
    """A recurrent layer in the place of attention; its inputs' matrices joined in pairs or not."""
    hidden, (keys, values) = shape.hidden, _widths(config)
    heads, width = _size(config, "linear_num_value_heads"), 2 * keys + values
    inputs = {"qkv": width, "z": values, "a": heads, "b": heads}
    if joined:
        inputs = {"qkvz": width + values, "ba": 2 * heads}
    return {
        **without(llama_like_tensors(shape), "self_attn."),
        "linear_attn.A_log": (heads,),
        "linear_attn.dt_bias": (heads,),
        "linear_attn.conv1d.weight": (width, 1, _size(config, "linear_conv_kernel_dim")),
        "linear_attn.norm.weight": (_size(config, "linear_value_head_dim"),),
        **{f"linear_attn.in_proj_{name}.weight": (rows, hidden) for name, rows in inputs.items()},
        "linear_attn.out_proj.weight": (hidden, values),
    }


def _tensors(config: Config, shape: ModelDimensions, layer: int, *, joined: bool = False) -> Shapes:
    if shape.layer_kinds[layer] == FULL:
        return _attention(config, shape)
    return _recurrent(config, shape, joined=joined)


def _with_experts(
    config: Config, shape: ModelDimensions, layer: int, *, joined: bool = False
) -> Shapes:
    """Experts for the MLP, and one that always works, behind a gate of its own."""
    always = config["shared_expert_intermediate_size"]
    return {
        **without(_tensors(config, shape, layer, joined=joined), "mlp."),
        "mlp.shared_expert_gate.weight": (1, shape.hidden),
        **mlp_tensors("mlp.shared_expert", shape.hidden, always),
        **expert_tensors(config, shape, config["moe_intermediate_size"]),
    }


def _refuse_experts(config: Config) -> str | None:
    always = config.get("shared_expert_intermediate_size")
    wide = type(always) is int and always > 0
    unlike = None if wide else f"its shared_expert_intermediate_size is {always!r}"
    return unknown_experts(config) or unlike or _refuse(config)


QWEN3_5 = Family(
    model_type="qwen3_5_text",
    title="Qwen3.5, Qwen3.6 (text)",
    base_class="Qwen3_5",
    config_class="Qwen3_5TextConfig",
    layer_tensors=_tensors,
    other_layers=_other_layers,
    refuse=_refuse,
    not_in_vllm=_NOT_IN_VLLM,
)

QWEN3_5_MOE = Family(
    model_type="qwen3_5_moe_text",
    title="Qwen3.5, Qwen3.6 (text, with experts)",
    base_class="Qwen3_5Moe",
    config_class="Qwen3_5MoeTextConfig",
    layer_tensors=_with_experts,
    other_layers=_other_layers,
    refuse=_refuse_experts,
    load_exactly=EXACTLY,
    pack_layer=pack_experts,
    stored_packed=packed_shapes,
    not_in_vllm=_NOT_IN_VLLM,
)

# As they are published: with a part that sees, which stays as it is.
QWEN3_5_VISION, QWEN3_5_MOE_VISION = (
    replace(
        family,
        model_type=family.model_type.removesuffix("_text"),
        title=family.title.replace("text", "multimodal"),
        config_class="",
        inside="text_config",
        prefix="model.language_model.",
    )
    for family in (QWEN3_5, QWEN3_5_MOE)
)

QWEN3_NEXT = Family(
    model_type="qwen3_next",
    title="Qwen3-Next",
    base_class="Qwen3Next",
    layer_tensors=partial(_with_experts, joined=True),
    other_layers=_other_layers,
    refuse=_refuse_experts,
    load_exactly=EXACTLY,
    pack_layer=pack_experts,
    not_in_vllm=_NOT_IN_VLLM,
)
