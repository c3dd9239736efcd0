"""Beam: several sets grow side by side, so that an early mistake can be made good."""

from __future__ import annotations

from typing import TYPE_CHECKING

from converter.calibration.search.beam import beam
from converter.calibration.selectors.base import Choice, Selector
from converter.calibration.selectors.greedy import greedy_cost
from converter.calibration.selectors.searching import choice_around

if TYPE_CHECKING:
    from converter.calibration.evaluator import PlanEvaluator
    from converter.inference.positions import TokenSpans
    from converter.model.mask import Mask

_WIDTH = 4


def _choose(evaluator: PlanEvaluator, keep: int) -> Choice:
    return choice_around(
        evaluator, beam(evaluator.losses, evaluator.total, keep, _WIDTH)[keep].layers
    )


def _cost(spans: TokenSpans, mask: Mask, total: int, keep: int) -> float:
    """A guess: at most a greedy search for each set of the beam."""
    return _WIDTH * greedy_cost(spans, mask, total, keep)


BEAM = Selector(
    name="beam",
    summary=f"as greedy, with {_WIDTH} sets side by side",
    choose=_choose,
    cost=_cost,
    by_mean=False,
    nested=False,
)
