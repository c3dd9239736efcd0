"""Evenly spaced full-attention layers, chosen without measuring: what measuring has to beat.

Which offset is best differs from model to model (SWAA, arXiv 2512.10411), so there is no default
worth trusting: a comparison with periodic plans means every offset.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from converter.calibration.selectors.base import Choice, Selector
from converter.common.errors import PlanError
from converter.inference.positions import TokenSpans
from converter.model.mask import Mask
from converter.plan.units import Units

if TYPE_CHECKING:
    from converter.calibration.evaluator import PlanEvaluator


def periodic_offsets(total: int, count: int) -> int:
    """How many different offsets a periodic plan of `count` layers has."""
    return total - (count - 1) * total // count if count else 1


def periodic_layers(total: int, count: int, offset: int) -> tuple[int, ...]:
    """Full-attention layers: `offset`, then every total/count layers (rounded down).

    Raises:
        PlanError: the offset moves the last layer past the end.
    """
    offsets = periodic_offsets(total, count)
    if not 0 <= offset < offsets:
        raise PlanError(
            "the offset of the periodic plan is out of range",
            where="--offset",
            expected=f"0 to {offsets - 1}",
            got=offset,
        )
    return tuple(offset + i * total // count for i in range(count))


def periodic_among(layers: Sequence[int], count: int, offset: int) -> tuple[int, ...]:
    """Of the layers that a plan is about, `offset`, then evenly spaced ones; raises as above."""
    return tuple(layers[i] for i in periodic_layers(len(layers), count, offset))


def unmeasured(layers: Sequence[int], total: int) -> Choice:
    """A choice of some layers that nothing was measured for."""
    return Choice((*layers, *(i for i in range(total) if i not in layers)), ())


class Periodic(Selector):
    """Evenly spaced layers, at the first offset."""

    def choose(self, evaluator: PlanEvaluator, keep: int) -> Choice:
        """Choose by the number of layers alone."""
        return unmeasured(periodic_layers(evaluator.total, keep, 0), evaluator.total)

    def cost(self, spans: TokenSpans, mask: Mask, units: Units, keep: int) -> float:  # noqa: ARG002
        """Nothing."""
        return 0.0


PERIODIC = Periodic(
    "periodic", "evenly spaced layers, from --offset on", measures=False, tells_heads=False
)
