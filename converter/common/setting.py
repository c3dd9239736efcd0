"""A setting as one row of a table: what help says of it, and which values it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_origin, get_type_hints

from converter.common.errors import did_you_mean

_KIND_NAMES = {int: "a whole number", bool: "true or false", str: "text"}


def setting(
    default: Any,
    help_text: str,
    *,
    told: str | None = None,
    choices: tuple[str, ...] = (),
    several: bool = False,
    least: int | None = None,
) -> Any:
    """A field of a dataclass of settings, with its row.

    Args:
        default: its value where the user gives none; None is decided from the model.
        help_text: one line for `--help`.
        told: what help says of the default, where that is not its value.
        choices: the values a string may have.
        several: whether a string may name several of them, with commas.
        least: the smallest value an integer may have.
    """
    told = told or (None if default is None or default is False else str(default))
    described = help_text if told is None else f"{help_text} [default: {told}]"
    row = {"help": described, "choices": choices, "several": several, "least": least}
    return field(default=default, metadata=row)


@dataclass(frozen=True)
class Setting:
    """One setting, as commands and recipes spell it.

    Attributes:
        name: its recipe key; the option is this with dashes.
        kind: `int`, `bool`, `str`, or `tuple` for layer indices.
        help, choices, several, least: see `setting`.
    """

    name: str
    kind: type
    help: str
    choices: tuple[str, ...]
    several: bool
    least: int | None

    @property
    def flag(self) -> str:
        """The command-line option."""
        return "--" + self.name.replace("_", "-")

    def parsed(self, value: Any) -> Any:
        """The text of an option as the setting's kind; what does not fit stays text."""
        if not isinstance(value, str):
            return value
        if self.kind is bool and value.lower() in ("true", "false"):
            return value.lower() == "true"
        try:
            if self.kind is int:
                return int(value)
            if self.kind is tuple:
                return [] if value in ("", "none") else [int(part) for part in value.split(",")]
        except ValueError:
            pass
        return value

    def problem_of(self, value: Any) -> str | None:
        """What is wrong with a value, as TOML gives it; None where nothing is."""
        if self.kind is tuple:
            if isinstance(value, list) and all(type(item) is int for item in value):
                return None
            return f"expected layer numbers such as 3,7,11, got {value!r}"
        if type(value) is not self.kind:
            return f"expected {_KIND_NAMES[self.kind]}, got {value!r}"
        if isinstance(value, str) and self.choices:
            parts = value.split(",") if self.several else [value]
            for wrong in (part or "nothing" for part in parts if part not in self.choices):
                hint = f"; {near}" if (near := did_you_mean(wrong, self.choices)) else ""
                return f"expected one of {', '.join(self.choices)}, got {wrong!r}{hint}"
        if isinstance(value, int) and self.least is not None and value < self.least:
            return f"expected at least {self.least}, got {value}"
        return None


def _kind(hint: Any) -> type:
    """`int` of `int | None`, and `tuple` of `tuple[int, ...] | None`."""
    parts = [part for part in get_args(hint) if part is not type(None)] or [hint]
    kind: type = get_origin(parts[0]) or parts[0]
    return kind


def rows_of(settings: type) -> Mapping[str, Setting]:
    """The rows of a dataclass whose fields `setting` made, by name."""
    hints = get_type_hints(settings).values()
    return {
        row.name: Setting(row.name, _kind(hint), **row.metadata)
        for row, hint in zip(fields(settings), hints, strict=True)
    }
