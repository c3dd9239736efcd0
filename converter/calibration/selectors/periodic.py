"""Evenly spaced full-attention layers, chosen without measuring.

Which offset is best differs from model to model (SWAA, arXiv 2512.10411), so there is no default
worth trusting: a comparison with periodic plans means every offset.
"""

from __future__ import annotations

from converter.calibration.selectors.base import Baseline
from converter.common.errors import PlanError


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


PERIODIC = Baseline(
    "periodic", "evenly spaced layers, from --offset on", periodic_layers, periodic_offsets
)
