"""What selectors by search have in common: an order of the layers around the set they found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from converter.calibration.selectors.base import Choice, ExampleScores, example_scores, means, rank

if TYPE_CHECKING:
    from converter.calibration.evaluator import PlanEvaluator
    from converter.inference.positions import TokenSpans
    from converter.model.mask import Mask


def choice_around(
    evaluator: PlanEvaluator, found: frozenset[int], order: Sequence[int] | None = None
) -> Choice:
    """The found layers first, then the others.

    Args:
        evaluator: tells what each layer is worth where the others are as found.
        found: the layers that keep full attention.
        order: of all layers, which holds inside and outside the found set; by default that of
            their worth.
    """
    examples = marginal_scores(evaluator, found)
    ranked = rank(means(examples)) if order is None else order
    return Choice(
        (*(i for i in ranked if i in found), *(i for i in ranked if i not in found)), examples
    )


def marginal_scores(evaluator: PlanEvaluator, found: frozenset[int]) -> tuple[ExampleScores, ...]:
    """What each layer's full attention takes off the loss, the other layers as found."""
    switched = [found ^ {layer} for layer in range(evaluator.total)]
    itself, *others = evaluator.answers([found, *switched])
    return tuple(
        example_scores(
            example,
            None,
            None,
            {
                layer: (answers[place].nll - itself[place].nll) * (1 if layer in found else -1)
                for layer, answers in enumerate(others)
            },
            evaluator.total,
        )
        for place, example in enumerate(evaluator.examples)
    )


def typical_cost(spans: TokenSpans, mask: Mask, sets: float, total: int) -> float:
    """What measuring so many sets, one layer apart, comes to in layer-forwards."""
    from converter.inference.positions import layer_forwards
    from converter.model.mask import SLIDING
    from converter.plan.plan import switched_plans

    return (
        layer_forwards(switched_plans(SLIDING, range(total), total), spans, mask)
        * sets
        / (total + 1)
    )
