"""The model as llama.cpp's own converter would write it, from a checkpoint of ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from converter.engines.gguf.architecture import (
    ROPE_FACTORS,
    ROTATES_NEIGHBOURS,
    GgufModel,
    cannot_honour,
)
from converter.engines.gguf.raw_weights import Stored, encoded, stored_tensors
from converter.engines.gguf.tensors import Tensor, constant, interleaved
from converter.model.dimensions import ModelDimensions
from converter.model.families.gguf_values import Keys
from converter.model.families.stock_gguf import StockGguf, rotary_parameters
from converter.model.source import Source

# Matrices that llama.cpp keeps in float32 whatever the file's type: routers are small and decide.
_ALWAYS_F32 = ("ffn_gate_inp.weight",)


def stock_model(source: Source, wanted: str, general: Keys) -> GgufModel:
    """The stock form of a source.

    Args:
        source: the model inside a checkpoint.
        wanted: type of the matrices: `f32`, `f16`, `bf16` or `q8_0`.
        general: the metadata that names no architecture.

    Raises:
        PlanError: llama.cpp does not have this family, or not in this variant.
    """
    stock, reason = source.family.stock_gguf, why_not(source)
    if stock is None or reason is not None:
        raise cannot_honour(reason or "", source.folder)
    return GgufModel(
        stock.arch,
        stock.metadata(source.config, source.shape),
        general,
        tuple(_tensors(source, stock, wanted)),
    )


def why_not(source: Source) -> str | None:
    """Why llama.cpp cannot compute a source at all, or None when it can."""
    if source.family.stock_gguf is None:
        return f"hybridize knows no llama.cpp architecture for {source.family.title}"
    return source.family.stock_gguf.why_not(source.config)


def precision(source: Source) -> str:
    """The type that holds every weight of a source exactly: `f32`, `f16` or `bf16`."""
    kinds = {stored.dtype for stored in stored_tensors(source).values()}
    return kinds.pop() if len(kinds) == 1 else "f32"


def extra_tensors(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the tensors that the stock form has and the source has not."""
    return (ROPE_FACTORS,) if rotary_parameters(config)["rope_type"] == "llama3" else ()


def _tensors(source: Source, stock: StockGguf, wanted: str) -> list[Tensor]:
    stored = stored_tensors(source)
    result = [_matrix("token_embd.weight", [stored["model.embed_tokens.weight"]], wanted)]
    if ROPE_FACTORS in extra_tensors(source.config):
        result.append(_rope_factors(source.config, source.shape))
    per_layer = source.family.layer_tensors(source.config, source.shape)
    by_name: dict[str, list[str]] = {}
    for suffix in per_layer:
        # Experts stand in order, one after another.
        parts = ["*" if part.isdigit() else part for part in suffix.split(".")]
        by_name.setdefault(stock.names[".".join(parts)], []).append(suffix)
    swap = ROTATES_NEIGHBOURS[stock.arch]
    for layer in range(source.shape.layers):
        for name, suffixes in by_name.items():
            pieces = [stored[f"model.layers.{layer}.{suffix}"] for suffix in suffixes]
            tensor = _matrix(f"blk.{layer}.{name}", pieces, wanted)
            if swap and name.split(".")[0] in ("attn_q", "attn_k"):
                tensor = interleaved(tensor, source.shape.head_dim)
            result.append(tensor)
    result.append(_matrix("output_norm.weight", [stored["model.norm.weight"]], wanted))
    if not source.family.is_tied(source.config):
        result.append(_matrix("output.weight", [stored["lm_head.weight"]], wanted))
    return result


def _matrix(name: str, pieces: list[Stored], wanted: str) -> Tensor:
    """Vectors stay float32, as everywhere in llama.cpp."""
    exact = len(pieces[0].shape) == 1 or name.endswith(_ALWAYS_F32)
    return encoded(name, pieces, "f32" if exact else wanted)


def _rope_factors(config: Mapping[str, Any], shape: ModelDimensions) -> Tensor:
    """Divisors of the rotary frequencies under Llama 3's scaling, one for each pair of a head.

    The rule is transformers' (modeling_rope_utils.py, `_compute_llama3_parameters`): long waves are
    divided by `factor`, short ones are kept, those between are blended.
    """
    import numpy

    parameters = rotary_parameters(config)
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    factor = float(parameters["factor"])
    original = float(parameters["original_max_position_embeddings"])
    exponents = numpy.arange(0, shape.head_dim, 2, dtype=numpy.float64) / shape.head_dim
    wavelengths = 2 * math.pi * float(parameters["rope_theta"]) ** exponents
    # 0 for waves longer than original / low, 1 for those shorter than original / high.
    blend = numpy.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    return constant(ROPE_FACTORS, 1.0 / ((1.0 - blend) / factor + blend))
