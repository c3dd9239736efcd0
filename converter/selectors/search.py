"""Search: greedy, then swaps, from every start that is cheap to have.

The starts are the greedy set, the best layers by restore-one (greedy's first step has measured
them) and the periodic plans. The best of them by its true loss is refined by swaps, so on the
examples searched on, the result is never worse than any of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from converter.search.greedy import greedy_add
from converter.search.oracle import by_loss, measure
from converter.search.swap import refine
from converter.selectors.base import Choice, Selector, means, rank
from converter.selectors.greedy import greedy_cost
from converter.selectors.nll_restore import NLL_RESTORE
from converter.selectors.periodic import periodic_layers, periodic_offsets
from converter.selectors.searching import choice_around, typical_cost

if TYPE_CHECKING:
    from converter.forward.rows import Extent
    from converter.mask import Mask
    from converter.study import Study


def _choose(study: Study, keep: int) -> Choice:
    total = study.total
    restored = rank(means(study.scores(NLL_RESTORE, range(total))))
    greedy = greedy_add(study.losses, total, keep)
    starts = [greedy.first(keep), frozenset(restored[:keep])]
    if keep:
        starts += [
            frozenset(periodic_layers(total, keep, offset))
            for offset in range(periodic_offsets(total, keep))
        ]
    best = by_loss(measure(study.losses, starts))[0]
    refined = refine(study.losses, best.layers, total).best
    return choice_around(study, refined.layers, greedy.order)


def _cost(extent: Extent, mask: Mask, total: int, keep: int) -> float:
    """A guess: greedy, the other starts, and two rounds of swaps."""
    sets = 2 * (total + 8) + (periodic_offsets(total, keep) if keep else 0)
    return greedy_cost(extent, mask, total, keep) + typical_cost(extent, mask, sets, total)


SEARCH = Selector(
    name="search",
    summary="greedy, restore-one or periodic, whichever is best, then swaps while they help",
    choose=_choose,
    cost=_cost,
    by_mean=False,
)
