"""Evolution: random swaps of the restore-one choice, thinned out on ever more examples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from converter.calibration.search.evolution import evolve
from converter.calibration.selectors.base import Choice, Selector, means, rank
from converter.calibration.selectors.nll_restore import NLL_RESTORE
from converter.calibration.selectors.searching import choice_around, typical_cost

if TYPE_CHECKING:
    from converter.calibration.evaluator import PlanEvaluator
    from converter.inference.positions import TokenSpans
    from converter.model.mask import Mask

_GENERATIONS = 16
_OFFSPRING = 32


def _choose(evaluator: PlanEvaluator, keep: int) -> Choice:
    restored = rank(means(evaluator.scores(NLL_RESTORE, range(evaluator.total))))
    found = evolve(
        evaluator.losses,
        [frozenset(restored[:keep])],
        evaluator.total,
        examples=len(evaluator.examples),
        generations=_GENERATIONS,
        offspring=_OFFSPRING,
    )
    return choice_around(evaluator, found.best.layers)


def _cost(spans: TokenSpans, mask: Mask, total: int, _keep: int) -> float:
    """A guess: of the offspring all are run on a 16th of the examples, few on more."""
    return typical_cost(spans, mask, 2 * total + 2 + _GENERATIONS * _OFFSPRING * 3 / 16, total)


EVOLUTION = Selector(
    name="evolution",
    summary="random swaps of the restore-one choice, kept where they help (as EvoPress)",
    choose=_choose,
    cost=_cost,
    by_mean=False,
    nested=False,
)
