"""Greedy: the layer that helps most beside those chosen already, again and again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from converter.calibration.search.greedy import greedy_add
from converter.calibration.selectors.base import Choice, Selector
from converter.calibration.selectors.searching import choice_around, typical_cost

if TYPE_CHECKING:
    from converter.calibration.evaluator import PlanEvaluator
    from converter.inference.positions import TokenSpans
    from converter.model.mask import Mask


def _choose(evaluator: PlanEvaluator, keep: int) -> Choice:
    found = greedy_add(evaluator.losses, evaluator.total, keep)
    return choice_around(evaluator, found.first(keep), found.order)


def greedy_cost(spans: TokenSpans, mask: Mask, total: int, keep: int) -> float:
    """A guess: every layer once, then half of them at each step."""
    sets = 2 * total + 2 + max(0, keep - 1) * max(4, total // 2)
    return typical_cost(spans, mask, sets, total)


GREEDY = Selector(
    name="greedy",
    summary="one layer after another, the one that helps most beside those chosen before",
    choose=_choose,
    cost=greedy_cost,
    by_mean=False,
)
