"""Scorers that switch one layer of a uniform model and look at the answer's loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converter.calibration.selectors.base import ExampleScores, Scorer, example_scores
from converter.model.mask import FULL, SLIDING

if TYPE_CHECKING:
    from converter.calibration.data.sources import Example
    from converter.inference.positions import Extent, Kinds
    from converter.inference.runner import Advance, Answer, Meter
    from converter.model.mask import Mask


@dataclass(frozen=True)
class Switching(Scorer):
    """A scorer by one switch.

    The score is what full attention in the layer takes off the loss, whichever of the two models
    has it there.

    Attributes:
        others: the kind of every layer but the switched one, which has the other kind.
    """

    others: str = SLIDING

    def sets(self, layers: Sequence[int], total: int) -> list[frozenset[int]]:
        """Full-attention layers of the uniform plan, and with each layer switched."""
        return [
            frozenset(i for i, kind in enumerate(plan) if kind == FULL)
            for plan in plans_of(self.others, layers, total)
        ]

    def of_answers(
        self, example: Example, layers: Sequence[int], total: int, answers: Sequence[Answer]
    ) -> ExampleScores:
        """Scores from the answers of the uniform model and of those with one layer switched."""
        uniform, *switched = answers
        sign = 1 if self.others == SLIDING else -1
        scores = {
            layer: sign * (uniform.nll - answer.nll)
            for layer, answer in zip(layers, switched, strict=True)
        }
        full = uniform.nll if self.others == FULL else None
        sliding = uniform.nll if self.others == SLIDING else None
        return example_scores(example, full, sliding, scores, total)


def switching_scorer(name: str, summary: str, others: str) -> Switching:
    """A scorer by one switch; see `Switching`."""

    def measure(
        meter: Meter, examples: Sequence[Example], layers: Sequence[int], advance: Advance
    ) -> list[ExampleScores]:
        answers = meter.answers(examples, plans_of(others, layers, meter.layers), advance)
        return [
            scorer.of_answers(example, layers, meter.layers, mine)
            for example, mine in zip(examples, answers, strict=True)
        ]

    def cost(extent: Extent, mask: Mask, total: int, layers: Sequence[int]) -> float:
        from converter.inference.positions import layer_forwards

        return layer_forwards(plans_of(others, layers, total), extent, mask)

    scorer = Switching(name, summary, measure, cost, single=True, others=others)
    return scorer


def plans_of(others: str, layers: Sequence[int], total: int) -> list[Kinds]:
    """The uniform plan, and one for each layer that is switched."""
    switched = FULL if others == SLIDING else SLIDING
    return [
        (others,) * total,
        *((others,) * layer + (switched,) + (others,) * (total - layer - 1) for layer in layers),
    ]
