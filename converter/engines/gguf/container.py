"""Reading a GGUF file that may come from anywhere: every size is checked before it is believed.

The format is that of ggml (docs/gguf.md in ggml-org/ggml), versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from converter.common.errors import GgufError
from converter.engines.gguf.extra import import_extra
from converter.engines.gguf.writer import Tensor, stored_rows
from converter.model.families.stock_gguf import Value

_MAGIC = b"GGUF"
_MOST_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32
# A key, a value or a tensor takes at least this many bytes, so that a count can be checked at once.
_LEAST_ENTRY_BYTES = 12
# No model's metadata is larger: the largest vocabularies take 10 MB and a million entries.
_MOST_METADATA_BYTES = 128 << 20
_MOST_ENTRIES = 1 << 22
# Types of values by number: names, and how struct packs them.
_NUMBERS = {
    0: ("uint8", "B"),
    1: ("int8", "b"),
    2: ("uint16", "H"),
    3: ("int16", "h"),
    4: ("uint32", "I"),
    5: ("int32", "i"),
    6: ("float32", "f"),
    7: ("bool", "?"),
    10: ("uint64", "Q"),
    11: ("int64", "q"),
    12: ("float64", "d"),
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Container:
    """A GGUF file whose structure has been checked.

    Attributes:
        metadata: all values by their full keys.
        tensors: in the order of the file, ready to be written elsewhere, byte for byte.
    """

    path: Path
    metadata: Mapping[str, Value]
    tensors: tuple[Tensor, ...]

    @property
    def arch(self) -> str:
        """The architecture that the file names."""
        return str(self.metadata["general.architecture"].value)

    def own_keys(self) -> dict[str, Value]:
        """The architecture's keys, without its name."""
        prefix, found = f"{self.arch}.", self.metadata
        return {key.removeprefix(prefix): found[key] for key in found if key.startswith(prefix)}


def is_gguf(path: Path) -> bool:
    """Whether a path is meant as a GGUF file, by its name or its first bytes."""
    if path.suffix == ".gguf" and not path.is_dir():
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
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(_Cursor(path, data))
    except OSError as error:
        raise GgufError("a file cannot be read", where=path, got=error.strerror) from error


def _damaged(path: Path, got: str) -> GgufError:
    again = "download or export it again"
    return GgufError("this is not a whole GGUF file", where=path, got=got, next_step=again)


class _Cursor:
    """A position in a file that never leaves it."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.size, self.position = path, len(data), 0
        self._entries = 0
        self._data = data

    def bytes(self, count: int) -> bytes:
        start = self.position
        if count > self.size - start:
            got = f"it ends at byte {self.size:,} in the middle of its metadata"
            raise _damaged(self.path, got)
        self.position = start + count
        if self.position > _MOST_METADATA_BYTES:
            raise _damaged(self.path, f"metadata of more than {_MOST_METADATA_BYTES:,} bytes")
        return self._data[start : self.position]

    def numbers(self, form: str, count: int = 1) -> list[Any]:
        layout = struct.Struct(f"<{count}{form}")
        return list(layout.unpack(self.bytes(layout.size)))

    def number(self, form: str) -> Any:
        return self.numbers(form)[0]

    def text(self) -> str:
        raw = self.bytes(self.number("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise _damaged(self.path, f"a text is not UTF-8 (byte {self.position:,})") from error

    def count(self, what: str, least_bytes: int = _LEAST_ENTRY_BYTES) -> int:
        found: int = self.number("Q")
        if found * least_bytes > self.size:
            raise _damaged(self.path, f"{found:,} {what} in a file of {self.size:,} bytes")
        self._entries += found
        if self._entries > _MOST_ENTRIES:
            raise _damaged(self.path, f"metadata of more than {_MOST_ENTRIES:,} entries")
        return found

    def value(self, kind: int) -> Value:
        if kind == _STRING:
            return Value("string", self.text())
        if is_array := kind == _ARRAY:
            kind = self.number("I")
            if kind == _STRING:
                texts = [self.text() for _ in range(self.count("texts", 8))]
                return Value("array", texts, "string")
        if kind not in _NUMBERS:
            what = "an array of" if is_array else "a value of unknown"
            raise _damaged(self.path, f"{what} type {kind}")
        name, form = _NUMBERS[kind]
        if is_array:
            return Value("array", self.numbers(form, self.count("items", 1)), name)
        return Value(name, self.number(form))


def _parse(cursor: _Cursor) -> Container:
    path, magic = cursor.path, cursor.bytes(4)
    if magic != _MAGIC:
        raise GgufError(
            "this is not a GGUF file", where=path, expected="a file that begins with GGUF",
            got=repr(magic),
        )  # fmt: skip
    version = cursor.number("I")
    if version not in (2, 3):
        raise GgufError(
            "this version of GGUF cannot be read",
            where=path,
            expected="2 or 3, little-endian",
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
    gguf = import_extra("gguf")
    # Values and bytes of the smallest unit of each of ggml's types.
    units = {int(kind): unit for kind, unit in gguf.constants.GGML_QUANT_SIZES.items()}
    placers = [_tensor_info(cursor, units) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", Value("uint32", _DEFAULT_ALIGNMENT)).value
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise _damaged(path, f"general.alignment is {alignment!r}")
    data = -(-cursor.position // alignment) * alignment
    tensors = tuple(placed(data) for placed in placers)
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise _damaged(path, "two tensors have the same name")
    return Container(path, metadata, tensors)


def _tensor_info(cursor: _Cursor, units: Mapping[int, tuple[int, int]]) -> Callable[[int], Tensor]:
    """Reads one; the result places it in a file whose data begin at some byte."""
    path, name = cursor.path, cursor.text()
    dimensions = cursor.number("I")
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise _damaged(path, f"tensor {name!r} has {dimensions} dimensions")
    # The file counts dimensions from the innermost.
    shape = tuple(cursor.numbers("Q", dimensions)[::-1])
    number, start = cursor.number("I"), cursor.number("Q")
    if number not in units:
        raise _damaged(path, f"tensor {name!r} has the unknown type {number}")
    values, unit_bytes = units[number]
    if any(size < 1 for size in shape) or shape[-1] % values:
        raise _damaged(path, f"tensor {name!r} has the shape {list(shape)}")
    row_bytes = shape[-1] // values * unit_bytes

    def placed(data: int) -> Tensor:
        blocks = partial(stored_rows, path, data + start, shape, row_bytes)
        tensor = Tensor(name, shape, number, row_bytes, blocks, data + start)
        end = tensor.start + tensor.bytes
        if end > cursor.size:
            raise _damaged(path, f"tensor {name!r} ends at byte {end:,} of {cursor.size:,}")
        return tensor

    return placed
