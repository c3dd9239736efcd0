"""GLM-4.5 to 4.7 and MiniMax-M2: experts whose router adds a learned bias to choose."""

from __future__ import annotations

from typing import Any

from converter.model.dimensions import ModelDimensions
from converter.model.families.base import (
    Family,
    already_slides,
    head_norms,
    llama_like_tensors,
    without,
)
from converter.model.families.experts import (
    EXACTLY,
    expert_tensors,
    mlp_tensors,
    pack_experts,
    unknown_experts,
)
from converter.model.families.stock_gguf import Config, Shapes, expert_count

_ROUTER_BIAS = "e_score_correction_bias"


def _glm4_moe_tensors(config: Config, shape: ModelDimensions, layer: int) -> Shapes:
    """The first layers are dense; every other has a router, experts and one that always works."""
    tensors = llama_like_tensors(shape, qkv_bias=bool(config.get("attention_bias", False)))
    if config.get("use_qk_norm", False):
        tensors |= head_norms(shape)
    if layer < config.get("first_k_dense_replace", 1):
        return tensors
    width = config["moe_intermediate_size"]
    always = width * config.get("n_shared_experts", 1)
    return {
        **without(tensors, "mlp."),
        f"mlp.gate.{_ROUTER_BIAS}": (expert_count(config),),
        **mlp_tensors("mlp.shared_experts", shape.hidden, always),
        **expert_tensors(config, shape, width),
    }


def _refuse_glm4_moe(config: Config) -> str | None:
    for key, least in (("first_k_dense_replace", 0), ("n_shared_experts", 1)):
        value = config.get(key, 1)
        if type(value) is not int or value < least:
            return f"its {key} is {value!r}"
    return unknown_experts(config) or already_slides(config)


def _minimax_m2_tensors(config: Config, shape: ModelDimensions, _layer: int) -> Shapes:
    """Norms over whole queries and keys; experts under Mixtral's names."""
    block, names = "block_sparse_moe", ("w1", "w3", "w2")
    return {
        **without(llama_like_tensors(shape), "mlp."),
        "self_attn.q_norm.weight": (shape.heads * shape.head_dim,),
        "self_attn.k_norm.weight": (shape.kv_heads * shape.head_dim,),
        f"{block}.{_ROUTER_BIAS}": (expert_count(config),),
        **expert_tensors(config, shape, shape.intermediate, block, names),
    }


def _pack_minimax_m2(tensors: dict[str, Any]) -> dict[str, Any]:
    renamed = {}
    for name, tensor in tensors.items():
        for stored, held in (
            ("block_sparse_moe.", "mlp."),
            (".w1.", ".gate_proj."),
            (".w3.", ".up_proj."),
            (".w2.", ".down_proj."),
        ):
            name = name.replace(stored, held)
        renamed[name] = tensor
    return pack_experts(renamed)


GLM4_MOE = Family(
    model_type="glm4_moe",
    title="GLM-4.5 to 4.7",
    base_class="Glm4Moe",
    layer_tensors=_glm4_moe_tensors,
    refuse=_refuse_glm4_moe,
    load_exactly=EXACTLY,
    pack_layer=pack_experts,
    float32_tensors=(_ROUTER_BIAS,),
)

MINIMAX_M2 = Family(
    model_type="minimax_m2",
    title="MiniMax-M2",
    base_class="MiniMaxM2",
    layer_tensors=_minimax_m2_tensors,
    refuse=lambda config: unknown_experts(config, "intermediate_size") or already_slides(config),
    load_exactly=EXACTLY,
    pack_layer=_pack_minimax_m2,
    not_in_vllm="its CPU build, where checkpoints are tested, does not route these experts",
)
