"""Typed metadata values, as GGUF stores them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# The type numbers of the GGUF format (ggml-org/ggml docs/gguf.md) and how struct packs them.
NUMBERS: dict[str, tuple[int, str]] = {
    "uint8": (0, "B"),
    "int8": (1, "b"),
    "uint16": (2, "H"),
    "int16": (3, "h"),
    "uint32": (4, "I"),
    "int32": (5, "i"),
    "float32": (6, "f"),
    "bool": (7, "?"),
    "uint64": (10, "Q"),
    "int64": (11, "q"),
    "float64": (12, "d"),
}
STRING, ARRAY = 8, 9
KINDS: dict[int, str] = {
    **{number: kind for kind, (number, _) in NUMBERS.items()},
    STRING: "string",
    ARRAY: "array",
}


@dataclass(frozen=True)
class Value:
    """One metadata value.

    Attributes:
        kind: its GGUF type, such as `uint32`, `string` or `array`.
        value: the Python value; a list for arrays.
        item: the type of an array's items.
    """

    kind: str
    value: Any
    item: str | None = None


Keys = Mapping[str, Value]


def integer(value: int) -> Value:
    """An unsigned number of 32 bits, as llama.cpp reads sizes."""
    return Value("uint32", value)


def real(value: float) -> Value:
    """A number of 32 bits."""
    return Value("float32", value)


def text(value: str) -> Value:
    """A string."""
    return Value("string", value)


def flag(value: bool) -> Value:
    """A boolean."""
    return Value("bool", value)


def array(item: str, values: Iterable[Any]) -> Value:
    """An array of items of one type."""
    return Value("array", list(values), item)


def number_of(keys: Keys, name: str, default: int | None = None) -> int | None:
    """A whole number among keys, or the default when it is absent or something else."""
    found = keys.get(name)
    return found.value if found is not None and type(found.value) is int else default
