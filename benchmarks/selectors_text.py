"""How the record of the comparison of selectors writes names and numbers."""

from __future__ import annotations

from collections.abc import Sequence

from selectors_results import Advantage

from converter.common.statistics import Estimate


def code(name: str) -> str:
    """A way of choosing as it is typed; names of what cannot be asked for stay plain."""
    return name if " " in name or name == "original" else f"`{name}`"


def layer_list(layers: Sequence[int]) -> str:
    """Numbers of layers."""
    return ", ".join(map(str, layers)) or "none"


def number(value: float, sign: str = "") -> str:
    """Three decimals, and no minus before zero."""
    return f"{round(value, 3) + 0.0:{sign}.3f}"


def interval(advantage: Advantage) -> str:
    """An advantage with its 95% interval."""
    mean, low, high = (
        number(value, "+") for value in (advantage.mean, advantage.low, advantage.high)
    )
    return f"{mean} [{low}, {high}]"


def signed(difference: Estimate) -> str:
    """A difference with its standard error."""
    error = "?" if difference.stderr is None else number(difference.stderr)
    return f"{number(difference.mean, '+')} ± {error}"
