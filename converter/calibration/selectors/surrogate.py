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
    from converter.calibration.evaluator import PlanEvaluator
    from converter.inference.positions import TokenSpans
    from converter.model.mask import Mask


def _choose(evaluator: PlanEvaluator, keep: int) -> Choice:
    layers = range(evaluator.total)
    with evaluator.keeping_states():
        restored = rank(means(evaluator.scores(NLL_RESTORE, layers)))
        removed = rank(means(evaluator.scores(NLL_REMOVE, layers)))
        known = [
            *NLL_RESTORE.sets(layers, evaluator.total),
            *NLL_REMOVE.sets(layers, evaluator.total),
        ]
        found = search(
            evaluator.losses,
            evaluator.foretold_losses,
            list(dict.fromkeys(known)),
            [frozenset(restored[:keep]), frozenset(removed[:keep])],
            evaluator.total,
        )
    return choice_around(evaluator, found.best.layers)


def _cost(spans: TokenSpans, mask: Mask, total: int, _keep: int) -> float:
    """A guess: both one-layer scores, and two rounds of proposals."""
    layers = range(total)
    scored = sum(s.cost(spans, mask, total, layers) for s in (NLL_RESTORE, NLL_REMOVE))
    return scored + typical_cost(spans, mask, total + 17, total)


SURROGATE = Selector(
    name="surrogate",
    summary="sets that a linear model of the answers' hidden states proposes, measured truly",
    choose=_choose,
    cost=_cost,
    by_mean=False,
    nested=False,
)
