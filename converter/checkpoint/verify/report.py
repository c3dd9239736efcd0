"""The outcome of a verification."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

# A weight file may hold a hundred thousand names.
_NAMED = 20


@dataclass(frozen=True)
class Check:
    """One thing that was checked: the value that was found, and what it was held against."""

    name: str
    ok: bool
    value: str | float | None
    limit: str | float | None


def names_check(name: str, wrong: Iterable[str], right: str, limit: str) -> Check:
    """A check that finds nothing wrong, or says by name what; of many, the first."""
    found = sorted(wrong)
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return Check(name, not found, (", ".join(found[:_NAMED]) or right) + more, limit)


@dataclass(frozen=True)
class Report:
    """All checks of one checkpoint.

    Attributes:
        checks: in order.
        sampled: files of whose bytes only samples could be compared.
    """

    checks: tuple[Check, ...]
    sampled: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every check held."""
        return not self.failed

    @property
    def failed(self) -> list[str]:
        """Names of the checks that did not hold."""
        return [check.name for check in self.checks if not check.ok]

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        checks = [asdict(check) for check in self.checks]
        return {"ok": self.ok, "checks": checks, "sampled": list(self.sampled)}
