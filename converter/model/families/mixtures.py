"""GLM-4.5 to 4.7 and MiniMax-M2: experts whose router adds a learned bias to choose."""

from __future__ import annotations

from typing import Any

from converter.model.dimensions import ModelDimensions
from converter.model.families.base import Family, already_slides, llama_like_tensors
from converter.model.families.experts import expert_tensors, pack_experts, unknown_experts
from converter.model.families.stock_gguf import Config, expert_count

# torch's grouped matrix product stops at float32.
_EXACTLY = {"experts_implementation": "eager"}
_ROUTER_BIAS = "e_score_correction_bias"


def _glm4_moe_tensors(config: Config, shape: ModelDimensions, layer: int) -> dict[str, Any]:
    """The first layers are dense; every other has a router, experts and one that always works."""
    hidden, bias = shape.hidden, bool(config.get("attention_bias", False))
    tensors: dict[str, tuple[int, ...]] = llama_like_tensors(shape, qkv_bias=bias)
    if config.get("use_qk_norm", False):
        tensors["self_attn.q_norm.weight"] = tensors["self_attn.k_norm.weight"] = (shape.head_dim,)
    if layer < config.get("first_k_dense_replace", 1):
        return tensors
    tensors = {name: size for name, size in tensors.items() if not name.startswith("mlp.")}
    width, experts = config["moe_intermediate_size"], expert_count(config)
    always = width * config.get("n_shared_experts", 1)
    return {
        **tensors,
        "mlp.gate.weight": (experts, hidden),
        f"mlp.gate.{_ROUTER_BIAS}": (experts,),
        "mlp.shared_experts.gate_proj.weight": (always, hidden),
        "mlp.shared_experts.up_proj.weight": (always, hidden),
        "mlp.shared_experts.down_proj.weight": (hidden, always),
        **expert_tensors(
            config,
            shape,
            width,
            "mlp.experts.*.gate_proj.weight",
            "mlp.experts.*.up_proj.weight",
            "mlp.experts.*.down_proj.weight",
        ),
    }


def _refuse_glm4_moe(config: Config) -> str | None:
    for key, least in (("first_k_dense_replace", 0), ("n_shared_experts", 1)):
        value = config.get(key, 1)
        if type(value) is not int or value < least:
            return f"its {key} is {value!r}"
    return unknown_experts(config) or already_slides(config)


def _minimax_m2_tensors(config: Config, shape: ModelDimensions, _layer: int) -> dict[str, Any]:
    """Norms over whole queries and keys; experts under Mixtral's names."""
    tensors = {k: v for k, v in llama_like_tensors(shape).items() if not k.startswith("mlp.")}
    return {
        **tensors,
        "self_attn.q_norm.weight": (shape.heads * shape.head_dim,),
        "self_attn.k_norm.weight": (shape.kv_heads * shape.head_dim,),
        "block_sparse_moe.gate.weight": (expert_count(config), shape.hidden),
        f"block_sparse_moe.{_ROUTER_BIAS}": (expert_count(config),),
        **expert_tensors(
            config,
            shape,
            shape.intermediate,
            "block_sparse_moe.experts.*.w1.weight",
            "block_sparse_moe.experts.*.w3.weight",
            "block_sparse_moe.experts.*.w2.weight",
        ),
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
    load_exactly=_EXACTLY,
    pack_layer=pack_experts,
    float32_tensors=(_ROUTER_BIAS,),
    runs_in_vllm=False,
)

MINIMAX_M2 = Family(
    model_type="minimax_m2",
    title="MiniMax-M2",
    base_class="MiniMaxM2",
    layer_tensors=_minimax_m2_tensors,
    refuse=lambda config: unknown_experts(config, "intermediate_size") or already_slides(config),
    load_exactly=_EXACTLY,
    pack_layer=_pack_minimax_m2,
    runs_in_vllm=False,
)
