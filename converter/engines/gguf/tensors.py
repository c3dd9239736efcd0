"""Tensors on their way into a GGUF file, a block of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Values converted at once: what is in memory at a time is a few times this.
_BLOCK_VALUES = 1 << 22

# ggml's type numbers (ggml/include/ggml.h) by our names for them, those that we write ourselves.
TYPE_NUMBERS = {"f32": 0, "f16": 1, "q8_0": 8, "bf16": 30}


@dataclass(frozen=True)
class Tensor:
    """One tensor to write.

    Attributes:
        name: its GGUF name.
        shape: outermost dimension first; the last one is a row.
        type_number: ggml's number of its type.
        row_bytes: bytes of one row in that type.
        blocks: yields its rows in order as uint8 arrays of (rows, row_bytes). The number of rows
            in a block is a multiple of the one asked for, except in the last block.
    """

    name: str
    shape: tuple[int, ...]
    type_number: int
    row_bytes: int
    blocks: Callable[[int], Iterator[NDArray[Any]]]

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return math.prod(self.shape[:-1])

    @property
    def bytes(self) -> int:
        """Size in the file, without padding."""
        return self.rows * self.row_bytes


def rows_per_block(row_values: int, multiple: int) -> int:
    """How many rows to convert at once: a multiple of `multiple`, at least that."""
    return max(1, _BLOCK_VALUES // max(1, row_values * multiple)) * multiple


def interleaved(tensor: Tensor, head_dim: int) -> Tensor:
    """The tensor with each head's rows in the order in which llama.cpp's NORM rope pairs them.

    transformers rotates row i of a head with row i + head_dim / 2; NORM rope rotates neighbours.
    A vector (a bias) is one row, whose values are reordered.
    """
    import numpy

    order = numpy.arange(head_dim).reshape(2, head_dim // 2).T.ravel()

    def blocks(multiple: int) -> Iterator[NDArray[Any]]:
        if len(tensor.shape) == 1:
            value_bytes = tensor.row_bytes // tensor.shape[0]
            for block in tensor.blocks(1):
                heads = block.reshape(-1, head_dim, value_bytes)
                yield heads[:, order].reshape(1, -1)
            return
        for block in tensor.blocks(math.lcm(multiple, head_dim)):
            heads = block.reshape(-1, head_dim, tensor.row_bytes)
            yield heads[:, order].reshape(-1, tensor.row_bytes)

    return replace(tensor, blocks=blocks)


def constant(name: str, values: NDArray[Any]) -> Tensor:
    """A vector of float32 that is not in the source."""
    import numpy

    data = numpy.ascontiguousarray(values, dtype=numpy.float32)
    raw = data.view(numpy.uint8).reshape(1, -1)
    number = TYPE_NUMBERS["f32"]
    return Tensor(name, data.shape, number, raw.shape[1], lambda _multiple: iter([raw]))
