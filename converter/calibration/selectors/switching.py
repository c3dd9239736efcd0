"""Scorers that switch one layer of a uniform model and look at the answer's loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converter.calibration.selectors.base import ExampleScores, Scorer, example_scores
from converter.model.mask import FULL, SLIDING
from converter.plan.plan import switched_plans

if TYPE_CHECKING:
    from converter.inference.example import Example
    from converter.inference.positions import TokenSpans
    from converter.inference.runner import Advance, Answer, ModelRunner
    from converter.model.mask import Mask


@dataclass(frozen=True)
class SingleLayerScorer(Scorer):
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
            for plan in switched_plans(self.others, layers, total)
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


def single_layer_scorer(name: str, summary: str, others: str) -> SingleLayerScorer:
    """A scorer by one switch; see `SingleLayerScorer`."""

    def measure(
        runner: ModelRunner, examples: Sequence[Example], layers: Sequence[int], advance: Advance
    ) -> list[ExampleScores]:
        answers = runner.answers(examples, switched_plans(others, layers, runner.layers), advance)
        return [
            scorer.of_answers(example, layers, runner.layers, mine)
            for example, mine in zip(examples, answers, strict=True)
        ]

    def cost(spans: TokenSpans, mask: Mask, total: int, layers: Sequence[int]) -> float:
        from converter.inference.positions import layer_forwards

        return layer_forwards(switched_plans(others, layers, total), spans, mask)

    scorer = SingleLayerScorer(name, summary, measure, cost, single=True, others=others)
    return scorer
