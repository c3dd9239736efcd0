"""SmolLM3, whose own code honours `layer_types`, and dense families whose code does not."""

from __future__ import annotations

from converter.model.dimensions import ModelDimensions
from converter.model.families.base import (
    Family,
    NativeForm,
    llama_like_tensors,
    plain_tensors,
    tensors_with_biases,
)
from converter.model.families.stock_gguf import (
    LLAMA_NAMES,
    OLMO2_NAMES,
    Config,
    Shapes,
    StockGguf,
    granite_keys,
    smollm3_keys,
)


def olmo2_tensors(config: Config, shape: ModelDimensions, layer: int) -> Shapes:
    """Norms after attention and MLP, and over whole queries and keys."""
    tensors = tensors_with_biases(config, shape, layer)
    del tensors["input_layernorm.weight"]
    return tensors | {
        "post_feedforward_layernorm.weight": (shape.hidden,),
        "self_attn.q_norm.weight": (shape.heads * shape.head_dim,),
        "self_attn.k_norm.weight": (shape.kv_heads * shape.head_dim,),
    }


def _phi3_tensors(_config: Config, shape: ModelDimensions, _layer: int) -> Shapes:
    """Llama's matrices with queries, keys and values in one, and gate and up in one."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "input_layernorm.weight": (shape.hidden,),
        "post_attention_layernorm.weight": (shape.hidden,),
        "self_attn.qkv_proj.weight": (query + 2 * key, shape.hidden),
        "self_attn.o_proj.weight": (shape.hidden, query),
        "mlp.gate_up_proj.weight": (2 * shape.intermediate, shape.hidden),
        "mlp.down_proj.weight": (shape.hidden, shape.intermediate),
    }


def _seed_oss_tensors(config: Config, shape: ModelDimensions, _layer: int) -> Shapes:
    return llama_like_tensors(
        shape,
        qkv_bias=bool(config.get("attention_bias", True)),
        o_bias=bool(config.get("attention_out_bias")),
        mlp_bias=bool(config.get("mlp_bias")),
    )


def _attention_bias(config: Config) -> str | None:
    if config.get("attention_bias"):
        return "llama.cpp has no bias in this family's attention (attention_bias)"
    return None


def _logit_scale(config: Config) -> dict[str, float]:
    """What vLLM multiplies logits by: it does not read what Granite divides them by."""
    scaling = config.get("logits_scaling")
    return {"logit_scale": 1 / scaling} if isinstance(scaling, int | float) and scaling else {}


SMOLLM3 = Family(
    model_type="smollm3",
    title="SmolLM3",
    base_class="SmolLM3",
    layer_tensors=tensors_with_biases,
    native=NativeForm("smollm3", "SmolLM3", "SmolLM3ForCausalLM", "4.53"),
    added_keys=lambda _config: {"use_sliding_window": True},
    tied_by_default=True,
    stock_gguf=StockGguf("smollm3", LLAMA_NAMES, keys=smollm3_keys),
)
OLMO2 = Family(
    model_type="olmo2",
    title="OLMo2",
    base_class="Olmo2",
    layer_tensors=olmo2_tensors,
    stock_gguf=StockGguf("olmo2", OLMO2_NAMES, epsilon=1e-5, unable=_attention_bias),
)
PHI3 = Family("phi3", "Phi-3", "Phi3", _phi3_tensors)
GEMMA = Family("gemma", "Gemma", "Gemma", tensors_with_biases, tied_by_default=True)
GRANITE = Family(
    model_type="granite",
    title="Granite",
    base_class="Granite",
    layer_tensors=tensors_with_biases,
    added_keys=_logit_scale,
    stock_gguf=StockGguf("granite", LLAMA_NAMES, keys=granite_keys),
)
SEED_OSS = Family("seed_oss", "Seed-OSS", "SeedOss", _seed_oss_tensors)
# Its queries grow with the position, which no form of another family's does.
MINISTRAL3 = Family("ministral3", "Ministral 3", "Ministral3", plain_tensors)
