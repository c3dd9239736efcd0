"""A model on its way into a GGUF file, a block of rows at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from converter.common.errors import OutputError, SourceError
from converter.common.files import check_file_absent, check_free_space, output_errors, sync_folder
from converter.engines.gguf.extra import import_extra
from converter.model.families.stock_gguf import Keys

_ALIGNMENT = 32
# Values converted at once: what is in memory at a time is a few times this.
_BLOCK_VALUES = 1 << 22
# ggml's number of the type (ggml/include/ggml.h).
F32 = 0


@dataclass(frozen=True)
class Tensor:
    """One tensor to write.

    Attributes:
        shape: outermost dimension first; the last one is a row.
        type_number: ggml's number of its type.
        blocks: yields its rows in order as uint8 arrays of (rows, row_bytes). The number of rows
            in a block is a multiple of the one asked for, except in the last block.
        start: offset of its first byte in the file that it was read from.
    """

    name: str
    shape: tuple[int, ...]
    type_number: int
    row_bytes: int
    blocks: Callable[[int], Iterator[NDArray[Any]]]
    start: int = 0

    @property
    def bytes(self) -> int:
        """Size in the file, without padding."""
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class GgufModel:
    """A model as it stands in a GGUF file.

    Attributes:
        keys: the architecture's metadata, without the name before it.
        general: all other metadata: `general.*`, `tokenizer.*` and ours.
        tensors: in the order of the file.
    """

    arch: str
    keys: Keys
    general: Keys
    tensors: tuple[Tensor, ...]


def stored_rows(
    path: Path, start: int, shape: tuple[int, ...], row_bytes: int, multiple: int
) -> Iterator[NDArray[Any]]:
    """The raw bytes of a tensor that starts at an offset in a file, in blocks as `Tensor` has.

    Raises:
        SourceError: the file became shorter than it was when its header was checked.
    """
    left = math.prod(shape[:-1])
    count = max(1, _BLOCK_VALUES // (shape[-1] * multiple)) * multiple
    with path.open("rb") as file:
        file.seek(start)
        while left:
            rows = min(count, left)
            data = numpy.fromfile(file, numpy.uint8, rows * row_bytes)
            if len(data) < rows * row_bytes:
                raise SourceError(
                    "a file of the model changed while it was in use",
                    where=path,
                    expected=f"{rows * row_bytes:,} bytes at {file.tell() - len(data):,}",
                    got=f"{len(data):,} bytes",
                    next_step="run the command again when nothing writes to the model any more",
                )
            yield data.reshape(rows, row_bytes)
            left -= rows


def interleaved(tensor: Tensor, head_dim: int) -> Tensor:
    """The tensor with each head's rows in the order in which llama.cpp's NORM rope pairs them.

    transformers rotates row i of a head with row i + head_dim / 2; NORM rope rotates neighbours.
    A vector (a bias) is one row, whose values are reordered.
    """
    order = numpy.arange(head_dim).reshape(2, head_dim // 2).T.ravel()
    is_vector = len(tensor.shape) == 1
    unit_bytes = tensor.row_bytes // tensor.shape[0] if is_vector else tensor.row_bytes

    def blocks(multiple: int) -> Iterator[NDArray[Any]]:
        for block in tensor.blocks(1 if is_vector else math.lcm(multiple, head_dim)):
            heads = block.reshape(-1, head_dim, unit_bytes)
            yield heads[:, order].reshape(block.shape)

    return replace(tensor, blocks=blocks)


def constant(name: str, values: Iterable[float]) -> Tensor:
    """A vector of float32 that is not in the source."""
    data = numpy.array(list(values), numpy.float32)
    raw = data.view(numpy.uint8).reshape(1, -1)
    return Tensor(name, data.shape, F32, raw.shape[1], lambda _multiple: iter([raw]))


@contextmanager
def new_file(final: Path, *, force: bool) -> Iterator[Path]:
    """A temporary name beside `final` that becomes it when the body is done.

    Raises:
        OutputError: `final` exists and `force` is not set, or it cannot be written.
    """
    check_file_absent(final, force)
    partial = final.with_name(f".{final.name}.partial")
    with output_errors(final):
        try:
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(final)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync_folder(final.absolute().parent)


def write_model(model: GgufModel, path: Path) -> None:
    """Write a model to a file, a few megabytes at a time.

    Raises:
        OutputError: the disk is full or may not be written to.
    """
    padded = [-(-tensor.bytes // _ALIGNMENT) * _ALIGNMENT for tensor in model.tensors]
    with output_errors(path):
        check_free_space(path.absolute().parent, sum(padded))
        _write_header(model, path)
        with path.open("r+b") as file:
            file.seek(0, os.SEEK_END)
            file.write(bytes(-file.tell() % _ALIGNMENT))
            for tensor, size in zip(model.tensors, padded, strict=True):
                written = 0
                for block in tensor.blocks(1):
                    file.write(block.tobytes())
                    written += block.nbytes
                if written != tensor.bytes:
                    raise OutputError(
                        f"tensor {tensor.name!r} changed while it was read",
                        where=path,
                        expected=f"{tensor.bytes:,} bytes",
                        got=f"{written:,}",
                    )
                file.write(bytes(size - written))


def _write_header(model: GgufModel, path: Path) -> None:
    """Metadata and tensor infos, by the package; it would take the data of each tensor whole."""
    gguf = import_extra("gguf")
    kinds = gguf.GGUFValueType
    writer = gguf.GGUFWriter(path, model.arch)
    keys = {f"{model.arch}.{name}": value for name, value in model.keys.items()}
    for key, value in {**model.general, **keys}.items():
        # The package writes these itself. It has no empty arrays, and an absent key reads the same.
        own = key in ("general.architecture", "general.alignment")
        if not own and (value.kind != "array" or value.value):
            item = None if value.item is None else kinds[value.item.upper()]
            writer.add_key_value(key, value.value, kinds[value.kind.upper()], sub_type=item)
    for tensor in model.tensors:
        kind = gguf.GGMLQuantizationType(tensor.type_number)
        shape, uint8 = (*tensor.shape[:-1], tensor.row_bytes), numpy.dtype(numpy.uint8)
        writer.add_tensor_info(tensor.name, shape, uint8, tensor.bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
