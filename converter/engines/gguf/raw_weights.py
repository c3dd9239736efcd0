"""Reading safetensors a few rows at a time, without a framework: bfloat16 stays as it is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.common.errors import FamilyError
from converter.engines.gguf.tensors import TYPE_NUMBERS, Tensor, rows_per_block
from converter.model.source import Source
from converter.model.weights import contained

if TYPE_CHECKING:
    from numpy.typing import NDArray

# safetensors' names for the types that can be exported, as ours, and bytes of a value.
_DTYPES = {"F32": ("f32", 4), "F16": ("f16", 2), "BF16": ("bf16", 2)}
# Values and bytes of a row's smallest unit.
_UNITS = {"f32": (1, 4), "f16": (1, 2), "bf16": (1, 2), "q8_0": (32, 34)}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies.

    Attributes:
        path: its shard.
        start: offset of its first byte in the file.
        dtype: `f32`, `f16` or `bf16`.
        shape: outermost dimension first.
    """

    path: Path
    start: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def row_values(self) -> int:
        """Values of one row."""
        return self.shape[-1]

    def blocks(self, rows: int) -> Iterator[NDArray[Any]]:
        """The raw bytes of its rows, `rows` at a time, as (rows, bytes of a row)."""
        import numpy

        row_bytes = self.row_values * _UNITS[self.dtype][1]
        left = math.prod(self.shape[:-1])
        with self.path.open("rb") as file:
            file.seek(self.start)
            while left:
                count = min(rows, left)
                data = numpy.fromfile(file, numpy.uint8, count * row_bytes)
                yield data.reshape(count, row_bytes)
                left -= count


def stored_tensors(source: Source) -> dict[str, Stored]:
    """Every tensor of a checked source.

    Raises:
        FamilyError: the weights are of a type that cannot be exported.
    """
    found = {}
    for shard in source.weights.shards:
        path = contained(source.folder, shard)
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] not in _DTYPES:
                raise FamilyError(
                    f"tensor {name!r} has a type that cannot be exported",
                    where=path,
                    expected=", ".join(_DTYPES),
                    got=entry["dtype"],
                )
            start = 8 + header_bytes + entry["data_offsets"][0]
            dtype = _DTYPES[entry["dtype"]][0]
            found[name] = Stored(path, start, dtype, tuple(entry["shape"]))
    return found


def encoded(name: str, pieces: Sequence[Stored], wanted: str) -> Tensor:
    """A tensor to write from tensors of the source, converted as it is read.

    Args:
        name: its GGUF name.
        pieces: one tensor, or the experts that are stacked into one.
        wanted: `f32`, `f16`, `bf16` or `q8_0`; rows that q8_0's blocks of 32 do not divide become
            f16, as llama.cpp's quantiser does.
    """
    values = pieces[0].row_values
    kind = "f16" if wanted == "q8_0" and values % 32 else wanted
    shape = pieces[0].shape if len(pieces) == 1 else (len(pieces), *pieces[0].shape)
    unit_values, unit_bytes = _UNITS[kind]

    def blocks(multiple: int) -> Iterator[NDArray[Any]]:
        for piece in pieces:
            for block in piece.blocks(rows_per_block(values, multiple)):
                yield _converted(block, piece.dtype, kind, name)

    row_bytes = values // unit_values * unit_bytes
    return Tensor(name, shape, TYPE_NUMBERS[kind], row_bytes, blocks)


def _converted(block: NDArray[Any], source: str, wanted: str, name: str) -> NDArray[Any]:
    import numpy

    if source == wanted:
        return block
    values = _as_float32(block, source)
    if wanted == "f32":
        return values.view(numpy.uint8)
    import gguf

    with numpy.errstate(over="ignore"):
        kind = gguf.GGMLQuantizationType[wanted.upper()]
        result: NDArray[Any] = gguf.quants.quantize(values, kind)
    # q8_0's scales are float16, too: the largest value divided by 127.
    if wanted != "bf16" and numpy.abs(values).max() / (127 if wanted == "q8_0" else 1) > 65504:
        raise FamilyError(
            f"tensor {name!r} has values that {wanted} cannot hold",
            expected="at most 65504 in magnitude",
            got=f"{float(numpy.abs(values).max()):.3g}",
            next_step="export with --type bf16",
        )
    return result.view(numpy.uint8)


def _as_float32(block: NDArray[Any], source: str) -> NDArray[Any]:
    import numpy

    if source == "bf16":
        # bfloat16 is the upper half of float32.
        return (block.view(numpy.uint16).astype(numpy.uint32) << 16).view(numpy.float32)
    dtype = numpy.float16 if source == "f16" else numpy.float32
    return block.view(dtype).astype(numpy.float32)
