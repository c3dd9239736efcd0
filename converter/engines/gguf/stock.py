"""The model as llama.cpp's own converter would write it, from a checkpoint of ours.

Weights are read a few rows at a time and without a framework, so that bfloat16 stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

from converter.checkpoint.writer import carried_files
from converter.common.errors import FamilyError
from converter.engines.gguf.architecture import (
    ROPE_FACTORS,
    ROTATES_NEIGHBOURS,
    extra_tensors,
    stock_form,
)
from converter.engines.gguf.extra import file_type, import_extra
from converter.engines.gguf.sampling import sampling_keys
from converter.engines.gguf.writer import GgufModel, Tensor, constant, interleaved, stored_rows
from converter.model.families.stock_gguf import (
    Config,
    StockGguf,
    Value,
    integer,
    rotary_parameters,
    text,
)
from converter.model.source import Source
from converter.model.weights import StoredTensor

# The types that can be exported, as safetensors and gguf name them, and bytes of a value.
_DTYPES = {"F32": 4, "F16": 2, "BF16": 2}
# Matrices that llama.cpp keeps in float32 whatever the file's type: routers are small and decide.
_ALWAYS_F32 = ("ffn_gate_inp.weight",)
# The largest number in float16.
_LARGEST_HALF = 65504
# How a licence file begins, in lower case and without punctuation, and its SPDX name.
_LICENCES = (("apache license version 20", "apache-2.0"), ("mit license", "mit"))


def stock_model(source: Source, wanted: str) -> GgufModel:
    """The stock form of a source, without its tokenizer.

    Args:
        source: the model inside a checkpoint.
        wanted: type of the matrices: `f32`, `f16`, `bf16` or `q8_0`.

    Raises:
        PlanError: llama.cpp does not have this family, or not in this variant.
        FamilyError: the weights are of a type that cannot be exported.
    """
    stock = stock_form(source, source.folder)
    keys, tensors = stock.metadata(source.config, source.shape), _tensors(source, stock, wanted)
    return GgufModel(stock.arch, keys, _general_keys(source, wanted), tuple(tensors))


def precision(source: Source) -> str:
    """The type that holds every weight of a source exactly: `f32`, `f16` or `bf16`.

    Raises:
        FamilyError: the weights are of a type that cannot be exported.
    """
    dtypes = {stored.dtype for stored in _stored_tensors(source).values()}
    return dtypes.pop().lower() if len(dtypes) == 1 else "f32"


def _general_keys(source: Source, kind: str) -> dict[str, Value]:
    name = source.name.rsplit("/", 1)[-1]
    keys = {
        "general.type": text("model"),
        "general.name": text(f"{name} hybrid"),
        "general.file_type": integer(file_type(kind)),
        "general.quantization_version": integer(2),
        "general.base_model.count": integer(1),
        "general.base_model.0.name": text(name),
    }
    if "/" in source.name:
        keys["general.base_model.0.repo_url"] = text(f"https://huggingface.co/{source.name}")
    return keys | sampling_keys(source.folder) | _licence_keys(source)


def _licence_keys(source: Source) -> dict[str, Value]:
    """The licence that a checkpoint carries as a file, recognised by its first words."""
    for name in carried_files(source.folder):
        if not name.startswith("LICENSE"):
            continue
        words = (source.folder / name).read_text(encoding="utf-8", errors="replace").split()
        beginning = " ".join(words[:12]).lower()
        plain = "".join(letter for letter in beginning if letter.isalnum() or letter == " ")
        for start, spdx in _LICENCES:
            if plain.startswith(start):
                return {"general.license": text(spdx)}
        return {"general.license": text("other"), "general.license.name": text(name)}
    return {}


def _stored_tensors(source: Source) -> Mapping[str, StoredTensor]:
    for name, stored in source.weights.tensors.items():
        if stored.dtype not in _DTYPES:
            raise FamilyError(
                f"tensor {name!r} has a type that cannot be exported",
                where=stored.path,
                expected=", ".join(_DTYPES),
                got=stored.dtype,
            )
    return source.weights.tensors


def _tensors(source: Source, stock: StockGguf, wanted: str) -> Iterator[Tensor]:
    stored = _stored_tensors(source)
    yield _encoded("token_embd.weight", [stored["model.embed_tokens.weight"]], wanted)
    if ROPE_FACTORS in extra_tensors(source.config):
        yield _rope_factors(source.config, source.shape.head_dim)
    by_name: dict[str, list[str]] = {}
    for suffix in source.family.layer_tensors(source.config, source.shape, 0):
        # Experts stand in order, one after another.
        parts = ["*" if part.isdigit() else part for part in suffix.split(".")]
        by_name.setdefault(stock.names[".".join(parts)], []).append(suffix)
    for layer in range(source.shape.layers):
        for name, suffixes in by_name.items():
            parts_stored = [stored[f"model.layers.{layer}.{suffix}"] for suffix in suffixes]
            tensor = _encoded(f"blk.{layer}.{name}", parts_stored, wanted)
            if ROTATES_NEIGHBOURS[stock.arch] and name.split(".")[0] in ("attn_q", "attn_k"):
                tensor = interleaved(tensor, source.shape.head_dim)
            yield tensor
    yield _encoded("output_norm.weight", [stored["model.norm.weight"]], wanted)
    if not source.family.is_tied(source.config):
        yield _encoded("output.weight", [stored["lm_head.weight"]], wanted)


def _encoded(name: str, parts: Sequence[StoredTensor], wanted: str) -> Tensor:
    """A tensor to write, from one or the experts that it stacks, converted as they are read."""
    gguf = import_extra("gguf")
    shape = parts[0].shape
    # Vectors and routers stay float32. Rows that q8_0's blocks of 32 do not divide become float16,
    # as llama.cpp's quantiser does.
    if len(shape) == 1 or name.endswith(_ALWAYS_F32):
        wanted = "f32"
    elif wanted == "q8_0" and shape[-1] % 32:
        wanted = "f16"
    kind = gguf.GGMLQuantizationType[wanted.upper()]
    unit_values, unit_bytes = gguf.GGML_QUANT_SIZES[kind]

    def blocks(multiple: int) -> Iterator[NDArray[Any]]:
        for part in parts:
            row_bytes = shape[-1] * _DTYPES[part.dtype]
            for block in stored_rows(part.path, part.start, shape, row_bytes, multiple):
                same = part.dtype == kind.name
                yield block if same else _converted(block, part.dtype, kind, name)

    stacked = shape if len(parts) == 1 else (len(parts), *shape)
    return Tensor(name, stacked, int(kind), shape[-1] // unit_values * unit_bytes, blocks)


def _converted(block: NDArray[Any], dtype: str, kind: Any, name: str) -> NDArray[Any]:
    """Rows of raw bytes of one type as those of another."""
    if dtype == "BF16":
        # bfloat16 is the upper half of float32.
        values = (block.view(numpy.uint16).astype(numpy.uint32) << 16).view(numpy.float32)
    else:
        stored = numpy.float16 if dtype == "F16" else numpy.float32
        values = block.view(stored).astype(numpy.float32)
    with numpy.errstate(over="ignore"):
        result: NDArray[Any] = import_extra("gguf").quants.quantize(values, kind)
    # q8_0's scales are float16, too: the largest value divided by 127.
    largest = float(numpy.abs(values).max())
    limit = {"F16": _LARGEST_HALF, "Q8_0": 127 * _LARGEST_HALF}.get(kind.name, math.inf)
    if largest > limit:
        raise FamilyError(
            f"tensor {name!r} has values that {kind.name.lower()} cannot hold",
            expected=f"at most {_LARGEST_HALF} in magnitude",
            got=f"{largest:.3g}",
            next_step="export with --type bf16",
        )
    return result.view(numpy.uint8)


def _rope_factors(config: Config, head_dim: int) -> Tensor:
    """Divisors of the rotary frequencies under Llama 3's scaling, one for each pair of a head."""
    # As transformers (modeling_rope_utils.py, `_compute_llama3_parameters`): long waves are divided
    # by `factor`, short ones are kept, those between are blended.
    parameters = rotary_parameters(config)
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    factor = float(parameters["factor"])
    original = float(parameters["original_max_position_embeddings"])
    exponents = numpy.arange(0, head_dim, 2, dtype=numpy.float64) / head_dim
    wavelengths = 2 * math.pi * float(parameters["rope_theta"]) ** exponents
    # 0 for waves longer than original / low, 1 for those shorter than original / high.
    blend = numpy.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    return constant(ROPE_FACTORS, 1.0 / ((1.0 - blend) / factor + blend))
