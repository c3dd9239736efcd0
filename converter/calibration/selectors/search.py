"""Search: greedy, then swaps, from every start that is cheap to have.

The starts are the greedy set, the best layers by restore-one (greedy's first step has measured
them) and the periodic plans. The best of them by its true loss is refined by swaps, so on the
examples searched on, the result is never worse than any of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from converter.calibration.search.greedy import greedy_add
from converter.calibration.search.oracle import by_loss, measure
from converter.calibration.search.swap import refine
from converter.calibration.selectors.base import Choice, Selector, means, rank
from converter.calibration.selectors.greedy import greedy_cost
from converter.calibration.selectors.nll_restore import NLL_RESTORE
from converter.calibration.selectors.periodic import periodic_layers, periodic_offsets
from converter.calibration.selectors.searching import choice_around, typical_cost

if TYPE_CHECKING:
    from converter.calibration.evaluator import PlanEvaluator
    from converter.inference.positions import TokenSpans
    from converter.model.mask import Mask


def _choose(evaluator: PlanEvaluator, keep: int) -> Choice:
    total = evaluator.total
    restored = rank(means(evaluator.scores(NLL_RESTORE, range(total))))
    greedy = greedy_add(evaluator.losses, total, keep)
    starts = [greedy.first(keep), frozenset(restored[:keep])]
    if keep:
        starts += [
            frozenset(periodic_layers(total, keep, offset))
            for offset in range(periodic_offsets(total, keep))
        ]
    best = by_loss(measure(evaluator.losses, starts))[0]
    refined = refine(evaluator.losses, best.layers, total).best
    return choice_around(evaluator, refined.layers, greedy.order)


def _cost(spans: TokenSpans, mask: Mask, total: int, keep: int) -> float:
    """A guess: greedy, the other starts, and two rounds of swaps."""
    sets = 2 * (total + 8) + (periodic_offsets(total, keep) if keep else 0)
    return greedy_cost(spans, mask, total, keep) + typical_cost(spans, mask, sets, total)


SEARCH = Selector(
    name="search",
    summary="greedy, restore-one or periodic, whichever is best, then swaps while they help",
    choose=_choose,
    cost=_cost,
    by_mean=False,
)
