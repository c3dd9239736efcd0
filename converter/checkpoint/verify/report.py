"""The outcome of a verification."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

Value = str | float | int | None


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    Attributes:
        name: what, in a few words.
        ok: whether it held.
        value: what was found.
        limit: what it was held against.
    """

    name: str
    ok: bool
    value: Value
    limit: Value


@dataclass(frozen=True)
class Report:
    """All checks of one checkpoint."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check held."""
        return all(check.ok for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {"ok": self.ok, "checks": [asdict(check) for check in self.checks]}
