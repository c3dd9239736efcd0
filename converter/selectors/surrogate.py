"""Surrogate: sets proposed by a linear model of the answers' hidden states, measured truly.

What a set's full attention does to the last hidden states of the answer's rows is foretold from the
sets measured so far; the output head turns that into a loss for a fraction of what running the
layers costs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from converter.search.surrogate import search
from converter.selectors.base import Choice, Selector, means, rank
from converter.selectors.nll_remove import NLL_REMOVE
from converter.selectors.nll_restore import NLL_RESTORE
from converter.selectors.searching import choice_around, typical_cost

if TYPE_CHECKING:
    from converter.forward.rows import Extent
    from converter.mask import Mask
    from converter.study import Study


def _choose(study: Study, keep: int) -> Choice:
    layers = range(study.total)
    with study.keeping_states():
        restored = rank(means(study.scores(NLL_RESTORE, layers)))
        removed = rank(means(study.scores(NLL_REMOVE, layers)))
        known = [*NLL_RESTORE.sets(layers, study.total), *NLL_REMOVE.sets(layers, study.total)]
        found = search(
            study.losses,
            study.foretold_losses,
            list(dict.fromkeys(known)),
            [frozenset(restored[:keep]), frozenset(removed[:keep])],
            study.total,
        )
    return choice_around(study, found.best.layers)


def _cost(extent: Extent, mask: Mask, total: int, _keep: int) -> float:
    """A guess: both one-layer scores, and two rounds of proposals."""
    layers = range(total)
    scored = sum(s.cost(extent, mask, total, layers) for s in (NLL_RESTORE, NLL_REMOVE))
    return scored + typical_cost(extent, mask, total + 17, total)


SURROGATE = Selector(
    name="surrogate",
    summary="sets that a linear model of the answers' hidden states proposes, measured truly",
    choose=_choose,
    cost=_cost,
    by_mean=False,
    nested=False,
)
