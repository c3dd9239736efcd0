"""Two-sided: restore-one and remove-one, weighted by how many layers will be full.

D_l = (1 - rho) restore_l + rho remove_l with rho = K / (L - 1). If losses were pairwise additive,
a layer's worth would go linearly from its restore-one score, where no other layer is full, to its
remove-one score, where all others are; rho is where a plan of K full layers lies between the two.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from converter.calibration.selectors.base import Choice, Selector, means, rank
from converter.calibration.selectors.nll_remove import NLL_REMOVE
from converter.calibration.selectors.nll_restore import NLL_RESTORE

if TYPE_CHECKING:
    from converter.calibration.evaluator import PlanEvaluator
    from converter.inference.positions import TokenSpans
    from converter.model.mask import Mask


def _choose(evaluator: PlanEvaluator, keep: int) -> Choice:
    layers = range(evaluator.total)
    share = min(1.0, keep / max(1, evaluator.total - 1))
    examples = tuple(
        replace(
            restore,
            full=remove.full,
            scores=tuple(
                (1 - share) * (a or 0.0) + share * (b or 0.0)
                for a, b in zip(restore.scores, remove.scores, strict=True)
            ),
        )
        for restore, remove in zip(
            evaluator.scores(NLL_RESTORE, layers), evaluator.scores(NLL_REMOVE, layers), strict=True
        )
    )
    return Choice(rank(means(examples)), examples)


def _cost(spans: TokenSpans, mask: Mask, total: int, _keep: int) -> float:
    layers = range(total)
    return NLL_RESTORE.cost(spans, mask, total, layers) + NLL_REMOVE.cost(
        spans, mask, total, layers
    )


TWO_SIDED = Selector(
    name="two-sided",
    summary="restore-one and remove-one, weighted by how many layers the budget keeps",
    choose=_choose,
    cost=_cost,
)
