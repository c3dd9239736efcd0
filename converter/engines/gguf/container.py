"""Reading a GGUF file that may come from anywhere: every size is checked before it is believed.

The format is that of ggml (docs/gguf.md in ggml-org/ggml), versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.common.errors import GgufError
from converter.engines.gguf.extra import import_gguf
from converter.engines.gguf.tensors import Tensor, rows_per_block
from converter.model.families.gguf_values import ARRAY, KINDS, NUMBERS, STRING, Value

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32
# A key, a value or a tensor takes at least this many bytes, so that a count can be checked at once.
_LEAST_ENTRY_BYTES = 12


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        name: its name.
        shape: outermost dimension first.
        type_number: ggml's number of its type.
        row_bytes: bytes of one row.
        start: offset of its first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    type_number: int
    row_bytes: int
    start: int

    @property
    def bytes(self) -> int:
        """Its size, without padding."""
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class Container:
    """A GGUF file whose structure has been checked.

    Attributes:
        path: the file.
        metadata: all values by their full keys.
        tensors: in the order of the file.
    """

    path: Path
    metadata: Mapping[str, Value]
    tensors: tuple[StoredTensor, ...]

    @property
    def arch(self) -> str:
        """The architecture that the file names."""
        return str(self.metadata["general.architecture"].value)

    def own_keys(self) -> dict[str, Value]:
        """The architecture's keys, without its name."""
        prefix = f"{self.arch}."
        return {
            key.removeprefix(prefix): value
            for key, value in self.metadata.items()
            if key.startswith(prefix)
        }

    def copied(self) -> tuple[Tensor, ...]:
        """The tensors to write elsewhere, byte for byte."""
        return tuple(_copied(self.path, tensor) for tensor in self.tensors)


def _copied(path: Path, stored: StoredTensor) -> Tensor:
    def blocks(multiple: int) -> Iterator[NDArray[Any]]:
        import numpy

        left = math.prod(stored.shape[:-1])
        count = rows_per_block(stored.row_bytes, multiple)
        with path.open("rb") as file:
            file.seek(stored.start)
            while left:
                rows = min(count, left)
                data = numpy.fromfile(file, numpy.uint8, rows * stored.row_bytes)
                yield data.reshape(rows, stored.row_bytes)
                left -= rows

    return Tensor(stored.name, stored.shape, stored.type_number, stored.row_bytes, blocks)


def is_gguf(path: Path) -> bool:
    """Whether a path is meant as a GGUF file, by its name or its first bytes."""
    if path.is_dir():
        return False
    if path.suffix == ".gguf":
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def read_container(path: Path) -> Container:
    """Read a file's metadata and check that its tensors lie inside it.

    Raises:
        GgufError: it is missing, is no GGUF, is truncated or contradicts itself.
    """
    try:
        file_bytes = path.stat().st_size
        if not path.is_file() or file_bytes < 24:
            raise _damaged(path, "it is too short" if path.is_file() else "it is not a file")
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return _parse(path, _Cursor(path, data, file_bytes))
    except OSError as error:
        raise GgufError("a file cannot be read", where=path, got=error.strerror) from error


def _damaged(path: Path, got: str) -> GgufError:
    return GgufError(
        "this is not a whole GGUF file",
        where=path,
        got=got,
        next_step="download or export it again",
    )


class _Cursor:
    """A position in a file that never leaves it."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.size, self.position = path, size, 0
        self._data = data

    def take(self, count: int) -> int:
        """Step over bytes; where they began."""
        start = self.position
        if count > self.size - start:
            raise _damaged(
                self.path, f"it ends at byte {self.size:,} in the middle of its metadata"
            )
        self.position = start + count
        return start

    def number(self, form: str) -> Any:
        start = self.take(struct.calcsize("<" + form))
        return struct.unpack_from("<" + form, self._data, start)[0]

    def bytes(self, count: int) -> bytes:
        start = self.take(count)
        return self._data[start : start + count]

    def text(self) -> str:
        raw = self.bytes(self.number("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise _damaged(self.path, f"a text is not UTF-8 (byte {self.position:,})") from error

    def count(self, what: str) -> int:
        found: int = self.number("Q")
        if found * _LEAST_ENTRY_BYTES > self.size:
            raise _damaged(self.path, f"{found:,} {what} in a file of {self.size:,} bytes")
        return found

    def value(self, number: int) -> Value:
        kind = KINDS.get(number)
        if number == STRING:
            return Value("string", self.text())
        if number == ARRAY:
            return self._array()
        if kind is None:
            raise _damaged(self.path, f"a value of unknown type {number}")
        return Value(kind, self.number(NUMBERS[kind][1]))

    def _array(self) -> Value:
        number, count = self.number("I"), self.number("Q")
        item = KINDS.get(number)
        if item is None or number == ARRAY:
            raise _damaged(self.path, f"an array of type {number}")
        if number == STRING:
            if count * 8 > self.size:
                raise _damaged(self.path, f"an array of {count:,} texts")
            return Value("array", [self.text() for _ in range(count)], item)
        form = NUMBERS[item][1]
        if count > self.size:
            raise _damaged(self.path, f"an array of {count:,} items")
        start = self.take(count * struct.calcsize("<" + form))
        return Value("array", list(struct.unpack_from(f"<{count}{form}", self._data, start)), item)


def _parse(path: Path, cursor: _Cursor) -> Container:
    magic = cursor.bytes(4)
    if magic != _MAGIC:
        raise GgufError(
            "this is not a GGUF file", where=path, expected="a file that begins with GGUF",
            got=repr(magic),
        )  # fmt: skip
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise GgufError(
            "this version of GGUF cannot be read",
            where=path,
            expected=f"{' or '.join(map(str, _VERSIONS))}, little-endian",
            got=version,
        )
    tensor_count, key_count = cursor.count("tensors"), cursor.count("keys")
    metadata: dict[str, Value] = {}
    for _ in range(key_count):
        key = cursor.text()
        if key in metadata:
            raise _damaged(path, f"the key {key!r} stands there twice")
        metadata[key] = cursor.value(cursor.number("I"))
    arch = metadata.get("general.architecture")
    if arch is None or arch.kind != "string":
        raise _damaged(path, "it names no architecture (general.architecture)")
    infos = [_tensor_info(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", Value("uint32", _DEFAULT_ALIGNMENT)).value
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise _damaged(path, f"general.alignment is {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    tensors = tuple(_placed(path, info, start, cursor.size) for info in infos)
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise _damaged(path, "two tensors have the same name")
    return Container(path, metadata, tensors)


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape (outermost first), type number and offset in the data."""
    name = cursor.text()
    dimensions = cursor.number("I")
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise _damaged(cursor.path, f"tensor {name!r} has {dimensions} dimensions")
    # The file counts dimensions from the innermost.
    shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
    return name, shape, cursor.number("I"), cursor.number("Q")


def _placed(
    path: Path, info: tuple[str, tuple[int, ...], int, int], start: int, file_bytes: int
) -> StoredTensor:
    name, shape, number, offset = info
    units = _units().get(number)
    if units is None:
        raise _damaged(path, f"tensor {name!r} has the unknown type {number}")
    values, unit_bytes = units
    if any(size < 1 for size in shape) or shape[-1] % values:
        raise _damaged(path, f"tensor {name!r} has the shape {list(shape)}")
    stored = StoredTensor(name, shape, number, shape[-1] // values * unit_bytes, start + offset)
    if stored.start + stored.bytes > file_bytes:
        raise _damaged(
            path, f"tensor {name!r} ends at byte {stored.start + stored.bytes:,} of {file_bytes:,}"
        )
    return stored


def _units() -> dict[int, tuple[int, int]]:
    """Values and bytes of the smallest unit of each of ggml's types."""
    gguf = import_gguf()
    return {
        int(kind): (values, unit_bytes)
        for kind, (values, unit_bytes) in gguf.constants.GGML_QUANT_SIZES.items()
    }
