"""Gemma 4's language models: layers of a window of their own, and full ones with wider heads.

The two kinds have other numbers of heads, and rotary embeddings of another base; no plan changes
that. In the large models full layers take their keys for values, before rotation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from converter.model.dimensions import ModelDimensions, bytes_per_value
from converter.model.families.base import (
    Family,
    head_norms,
    llama_like_tensors,
    unlike_kinds,
    without,
)
from converter.model.families.experts import EXACTLY, unknown_experts
from converter.model.families.own_windows import NOT_IN_VLLM, own_kinds
from converter.model.families.stock_gguf import Config, Shapes, expert_count
from converter.model.mask import FULL, OWN_SLIDING, SLIDING

# What transformers takes where the config does not say.
_WINDOW, _EVERY, _FULL_HEAD_DIM, _PER_LAYER_INPUT = 512, 6, 512, 256
_OF_LAYERS = "per_layer_config"
# Where a layer has experts beside its MLP.
_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
_NORMS_OF_EXPERTS = ("post_feedforward_layernorm_1", *(f"{norm}_2" for norm in _NORMS))


def _of_full_layers(config: Config) -> dict[str, int]:
    """Sizes of heads that the full layers have for themselves."""
    if (stored := config.get(_OF_LAYERS)) is not None:
        sizes: dict[str, int] = next(iter(stored.values()), {})
        return sizes
    sizes = {"head_dim": config.get("global_head_dim") or _FULL_HEAD_DIM}
    kv_heads = config.get("num_global_key_value_heads")
    if config.get("attention_k_eq_v") and kv_heads is not None:
        sizes["num_key_value_heads"] = kv_heads
    return sizes


def _other_layers(config: Config, shape: ModelDimensions) -> dict[str, Any]:
    full = _of_full_layers(config)
    own = 2 * shape.kv_heads * shape.head_dim * bytes_per_value(config)
    found = own_kinds(config, shape.layers, _EVERY)
    return {
        "head_dim": full.get("head_dim", shape.head_dim),
        "kv_heads": full.get("num_key_value_heads", shape.kv_heads),
        "kinds": tuple(OWN_SLIDING if kind == SLIDING else kind for kind in found),
        "own_window_tokens": config.get("sliding_window", _WINDOW) or 0,
        "own_kv_bytes_per_token": own,
    }


def _per_layer(config: Config, shape: ModelDimensions) -> dict[str, Any]:
    return {_OF_LAYERS: {layer: _of_full_layers(config) for layer in shape.full_layers}}


def _refuse(config: Config) -> str | None:
    if config.get("hidden_size_per_layer_input", _PER_LAYER_INPUT):
        return "each layer reads an embedding of its own (hidden_size_per_layer_input)"
    if config.get("num_kv_shared_layers", 0):
        return "its last layers share the keys of earlier ones (num_kv_shared_layers)"
    if config.get("use_bidirectional_attention") == "all":
        return "its attention looks forward, too (use_bidirectional_attention)"
    kinds = own_kinds(config, config["num_hidden_layers"], _EVERY)
    if unlike := unlike_kinds(config, kinds, (FULL, SLIDING)):
        return unlike
    if kinds[-1] != FULL:
        return "its last layer does not attend fully, which transformers would change"
    mixture = config.get("enable_moe_block")
    return (unknown_experts(config) if mixture else None) or _refuse_sizes(config, kinds)


def _refuse_sizes(config: Config, kinds: list[str]) -> str | None:
    for key in ("head_dim", "num_key_value_heads"):
        if config.get(key) is None:
            return f"it does not say its {key}"
    if (config.get("sliding_window", _WINDOW) or 0) < 2:
        return "its sliding layers have no window (sliding_window)"
    stored = config.get(_OF_LAYERS)
    full = [str(layer) for layer, kind in enumerate(kinds) if kind == FULL]
    alike = stored is None or (
        isinstance(stored, dict)
        and sorted(stored) == sorted(full)
        and all(value == stored[full[0]] for value in stored.values())
        and isinstance(stored[full[0]], dict)
    )
    if not alike or not set(_of_full_layers(config)) <= {"head_dim", "num_key_value_heads"}:
        return f"its {_OF_LAYERS} is not one for all full layers"
    wrong = [v for v in _of_full_layers(config).values() if type(v) is not int or v < 1]
    return f"its full layers' heads are {wrong[0]!r}" if wrong else None


def _tensors(config: Config, shape: ModelDimensions, layer: int) -> Shapes:
    hidden, full = shape.hidden, shape.layer_kinds[layer] == FULL
    head_dim = shape.head_dim if full else config["head_dim"]
    kv_heads = shape.kv_heads if full else config["num_key_value_heads"]
    bias = bool(config.get("attention_bias"))
    of_layer = replace(shape, head_dim=head_dim, kv_heads=kv_heads)
    tensors = llama_like_tensors(of_layer, qkv_bias=bias, o_bias=bias)
    if full and config.get("attention_k_eq_v"):
        tensors = without(tensors, ".v_proj.")
    mixture = bool(config.get("enable_moe_block"))
    return {
        **tensors,
        **(_experts(config, shape) if mixture else {}),
        **{f"{norm}.weight": (hidden,) for norm in (*_NORMS, *(_NORMS_OF_EXPERTS * mixture))},
        **head_norms(of_layer),
        "layer_scalar": (1,),
    }


def _experts(config: Config, shape: ModelDimensions) -> Shapes:
    """A router and its experts, each kind of matrix in one tensor."""
    hidden, experts, width = shape.hidden, expert_count(config), config["moe_intermediate_size"]
    return {
        "router.proj.weight": (experts, hidden),
        "router.scale": (hidden,),
        "router.per_expert_scale": (experts,),
        "experts.gate_up_proj": (experts, 2 * width, hidden),
        "experts.down_proj": (experts, hidden, width),
    }


GEMMA4 = Family(
    model_type="gemma4_text",
    title="Gemma 4 (text)",
    base_class="Gemma4",
    config_class="Gemma4TextConfig",
    layer_tensors=_tensors,
    other_layers=_other_layers,
    per_layer=_per_layer,
    refuse=_refuse,
    tied_by_default=True,
    load_exactly=EXACTLY,
    not_in_vllm=NOT_IN_VLLM,
)
