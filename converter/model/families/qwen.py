"""Qwen2, Qwen2.5 and Qwen3, whose own code honours `layer_types`, and Qwen3-MoE, whose does not."""

from __future__ import annotations

from converter.model.dimensions import ModelDimensions
from converter.model.families.base import (
    TRANSFORMERS_BACKEND,
    Family,
    NativeForm,
    already_slides,
    head_norms,
    llama_like_tensors,
    without,
)
from converter.model.families.experts import EXACTLY, expert_tensors, pack_experts, unknown_experts
from converter.model.families.stock_gguf import (
    EXPERT_NAMES,
    LLAMA_NAMES,
    Config,
    Shapes,
    StockGguf,
    expert_keys,
)

# Without use_sliding_window the configuration class sets the window to None. max_window_layers
# means nothing beside layer_types, but vLLM's own Qwen code runs full attention silently when it
# equals the number of layers, as it does in most Qwen checkpoints, and refuses when it is 0.
_WINDOW_KEYS = {"use_sliding_window": True, "max_window_layers": 0}


def _qwen3_moe_tensors(config: Config, shape: ModelDimensions, layer: int) -> Shapes:
    """Attention, router and experts; `refuse` has seen to it that every layer has experts."""
    dense = without(_qwen3_tensors(config, shape, layer), "mlp.")
    return dense | expert_tensors(config, shape, config["moe_intermediate_size"])


def _qwen3_tensors(config: Config, shape: ModelDimensions, _layer: int) -> Shapes:
    bias = bool(config.get("attention_bias", False))
    return llama_like_tensors(shape, qkv_bias=bias, o_bias=bias) | head_norms(shape)


def _output_bias(config: Config) -> str | None:
    if config.get("attention_bias"):
        return "llama.cpp has no bias after this family's attention (attention_bias)"
    return None


def _unlike_llama_cpp_experts(config: Config) -> str | None:
    if not config.get("norm_topk_prob", False):
        return "llama.cpp normalises the experts' weights, and this model does not (norm_topk_prob)"
    return _output_bias(config)


QWEN2 = Family(
    model_type="qwen2",
    title="Qwen2, Qwen2.5",
    base_class="Qwen2",
    native=NativeForm("qwen2", "Qwen2", TRANSFORMERS_BACKEND, "4.53"),
    added_keys=lambda _config: _WINDOW_KEYS,
    layer_tensors=lambda _config, shape, _layer: llama_like_tensors(shape, qkv_bias=True),
    stock_gguf=StockGguf("qwen2", LLAMA_NAMES),
    mlx_module="qwen2",
)

QWEN3 = Family(
    model_type="qwen3",
    title="Qwen3",
    base_class="Qwen3",
    native=NativeForm("qwen3", "Qwen3", TRANSFORMERS_BACKEND, "4.53"),
    added_keys=lambda _config: _WINDOW_KEYS,
    layer_tensors=_qwen3_tensors,
    stock_gguf=StockGguf("qwen3", LLAMA_NAMES, unable=_output_bias),
    mlx_module="qwen3",
)

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    title="Qwen3-MoE",
    base_class="Qwen3Moe",
    added_keys=lambda _config: _WINDOW_KEYS,
    layer_tensors=_qwen3_moe_tensors,
    refuse=lambda config: unknown_experts(config) or already_slides(config),
    load_exactly=EXACTLY,
    pack_layer=pack_experts,
    stock_gguf=StockGguf(
        "qwen3moe", EXPERT_NAMES, keys=expert_keys, unable=_unlike_llama_cpp_experts
    ),
)
