"""Surrogate: sets proposed by a linear model of the answers' hidden states, measured truly.

What a set's full attention does to the last hidden states of the answer's rows is foretold from the
sets measured so far; the output head turns that into a loss for a fraction of what running the
layers costs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from converter.calibration.search.surrogate import search
from converter.calibration.selectors.base import Choice, Selector, means, rank
from converter.calibration.selectors.nll_remove import NLL_REMOVE
from converter.calibration.selectors.nll_restore import NLL_RESTORE
from converter.calibration.selectors.searching import choice_around, typical_cost

if TYPE_CHECKING:
    from converter.calibration.evaluator import Study
    from converter.inference.positions import Extent
    from converter.model.mask import Mask


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
