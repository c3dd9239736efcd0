"""What selectors by search have in common: an order of the layers around the set they found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from converter.calibration.selectors.base import Choice, ExampleScores, example_scores, means, rank

if TYPE_CHECKING:
    from converter.calibration.evaluator import Study
    from converter.inference.positions import Extent
    from converter.model.mask import Mask


def choice_around(
    study: Study, found: frozenset[int], order: Sequence[int] | None = None
) -> Choice:
    """The found layers first, then the others.

    Args:
        study: tells what each layer is worth where the others are as found.
        found: the layers that keep full attention.
        order: of all layers, which holds inside and outside the found set; by default that of
            their worth.
    """
    examples = marginal_scores(study, found)
    ranked = rank(means(examples)) if order is None else order
    return Choice(
        (*(i for i in ranked if i in found), *(i for i in ranked if i not in found)), examples
    )


def marginal_scores(study: Study, found: frozenset[int]) -> tuple[ExampleScores, ...]:
    """What each layer's full attention takes off the loss, the other layers as found."""
    switched = [found ^ {layer} for layer in range(study.total)]
    itself, *others = study.answers([found, *switched])
    return tuple(
        example_scores(
            example,
            None,
            None,
            {
                layer: (answers[place].nll - itself[place].nll) * (1 if layer in found else -1)
                for layer, answers in enumerate(others)
            },
            study.total,
        )
        for place, example in enumerate(study.examples)
    )


def typical_cost(extent: Extent, mask: Mask, sets: float, total: int) -> float:
    """What measuring so many sets, one layer apart, comes to in layer-forwards."""
    from converter.calibration.selectors.switching import plans_of
    from converter.inference.positions import layer_forwards
    from converter.model.mask import SLIDING

    return layer_forwards(plans_of(SLIDING, range(total), total), extent, mask) * sets / (total + 1)
