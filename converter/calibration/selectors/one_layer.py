"""Scores of one layer at a time: by switching it, or by the slope of the loss along its gate.

`nll-restore`  D_l = L_ans(all SWA) - L_ans(all SWA, layer l FA), the score that the authors of
    NLL-guided layer selection propose (arXiv 2606.27791).
`nll-remove`   D_l = L_ans(all FA, layer l SWA) - L_ans(all FA), the reading of their abstract.
`kl`           D_l = KL(all FA || all SWA) - KL(all FA || all SWA, layer l FA) of next-token
    distributions (KL-guided layer selection, arXiv 2512.20569). The full model is the teacher:
    answers need not be right. In the paper the cheap layers are linear attention and take a little
    training on generic text before they are scored; here nothing is trained, and the texts are
    those of the calibration.
`path-integral`  All gates go from 0 to 1 together; a layer's score is the mean of -dL_ans/da_l on
    the way, so that the scores sum to L_ans(all SWA) - L_ans(all FA) up to the quadrature
    (integrated gradients, arXiv 1703.01365). The sum is a check built in: `nll` in the scores file
    holds both ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, ClassVar

from converter.calibration.scores import ExampleScores
from converter.calibration.selectors.ranking import LayerSelector, example_scores
from converter.inference.example import Example
from converter.inference.positions import (
    LayerTypes,
    TokenSpans,
    divergence_layer_forwards,
    gradient_layer_forwards,
    layer_forwards,
)
from converter.model.mask import FULL, SLIDING, Mask
from converter.plan.units import Units, switched_plans

if TYPE_CHECKING:
    from converter.calibration.evaluator import PlanEvaluator
    from converter.inference.runner import Advance, Answer, ModelRunner


@dataclass(frozen=True)
class SwitchedLayer(LayerSelector):
    """What full attention in one layer takes off the answer's loss.

    Attributes:
        others: the kind of every layer but the scored one.
    """

    others: str = SLIDING

    def measure(
        self,
        runner: ModelRunner,
        examples: Sequence[Example],
        chosen: Sequence[int],
        advance: Advance,
        units: Units,
    ) -> list[ExampleScores]:
        """Score units by running the uniform model, and with each of them switched."""
        plans = switched_plans(self.others, units, chosen)
        answers = runner.answers(examples, plans, advance)
        return self._of_answers(examples, chosen, units.total, answers)

    def scores(
        self,
        evaluator: PlanEvaluator,
        chosen: Sequence[int],
        begin: int = 0,
        end: int | None = None,
    ) -> list[ExampleScores]:
        """As `measure`, from answers that others may have asked for too."""
        uniform = frozenset(range(evaluator.total) if self.others == FULL else ())
        by_set = evaluator.answers([uniform, *(uniform ^ {i} for i in chosen)], begin, end)
        examples, answers = evaluator.examples[begin:end], zip(*by_set, strict=True)
        return self._of_answers(examples, chosen, evaluator.total, answers)

    def _of_answers(
        self,
        examples: Sequence[Example],
        chosen: Sequence[int],
        total: int,
        answers: Iterable[Sequence[Answer]],
    ) -> list[ExampleScores]:
        """Scores from the answers of the uniform model and of those with one unit switched."""
        sign, measured = 1 if self.others == SLIDING else -1, []
        for example, (uniform, *switched) in zip(examples, answers, strict=True):
            gains = (sign * (uniform.nll - answer.nll) for answer in switched)
            scores = map(dict(zip(chosen, gains, strict=True)).get, range(total))
            full, sliding = (uniform.nll, None) if self.others == FULL else (None, uniform.nll)
            measured.append(example_scores(example, full, sliding, scores))
        return measured

    def cost_of_scoring(
        self, spans: TokenSpans, mask: Mask, units: Units, chosen: Sequence[int]
    ) -> float:
        """Of all plans together, which share what they have in common."""
        return layer_forwards(switched_plans(self.others, units, chosen), spans, mask)


class Divergence(LayerSelector):
    """What full attention in one layer takes off the distance to the full model.

    Attributes:
        every_row: over all rows of the examples; else over those that predict the answer.
    """

    every_row: ClassVar[bool] = False

    def measure(
        self,
        runner: ModelRunner,
        examples: Sequence[Example],
        chosen: Sequence[int],
        advance: Advance,
        units: Units,
    ) -> list[ExampleScores]:
        """Score units, in nats per row."""
        plans = switched_plans(SLIDING, units, chosen)
        divergences = runner.divergences(examples, plans, advance, every_row=self.every_row)
        measured = []
        for example, (uniform, *restored) in zip(examples, divergences, strict=True):
            scores = {unit: uniform - left for unit, left in zip(chosen, restored, strict=True)}
            by_unit = map(scores.get, range(units.total))
            measured.append(example_scores(example, None, None, by_unit))
        return measured

    def cost_of_scoring(
        self, spans: TokenSpans, mask: Mask, units: Units, chosen: Sequence[int]
    ) -> float:
        """Of the switched plans and of the full model."""
        plans = switched_plans(SLIDING, units, chosen)
        return divergence_layer_forwards(plans, spans, mask, every_row=self.every_row)


# Midpoints of so many equal parts of the way.
_NODES = 8


class PathIntegral(LayerSelector):
    """Gate gradients along the way from all sliding to all full."""

    def measure(
        self,
        runner: ModelRunner,
        examples: Sequence[Example],
        chosen: Sequence[int],  # noqa: ARG002 - a gradient has them all
        advance: Advance,
        units: Units,
    ) -> list[ExampleScores]:
        """Score every unit."""
        uniform = runner.answers(examples, _ends(units), advance)
        nodes = [
            runner.gate_gradients(
                examples, units.rows([(node + 0.5) / _NODES] * units.total), advance
            )
            for node in range(_NODES)
        ]
        measured = []
        for index, example in enumerate(examples):
            full, sliding = uniform[index]
            by_node = zip(*(node[index].slopes for node in nodes), strict=True)
            scores = [-fmean(slopes) for slopes in by_node]
            measured.append(example_scores(example, full.nll, sliding.nll, scores))
        return measured

    def cost_of_scoring(
        self,
        spans: TokenSpans,
        mask: Mask,
        units: Units,
        chosen: Sequence[int],  # noqa: ARG002 - as many as there are
    ) -> float:
        """Of both ends, and of every node there and back."""
        ends = _ends(units)
        forwards = layer_forwards(ends, spans, mask)
        return forwards + _NODES * gradient_layer_forwards(ends[0], spans, mask)


def _ends(units: Units) -> list[LayerTypes]:
    """Everything full, and everything sliding."""
    return [(FULL,) * units.layers, (SLIDING,) * units.layers]


NLL_RESTORE = SwitchedLayer(
    "nll-restore",
    "loss that one layer's full attention brings back to the all-sliding model",
)
NLL_REMOVE = SwitchedLayer(
    "nll-remove",
    "loss that sliding in one layer adds to the full-attention model",
    others=FULL,
)
KL = Divergence(
    "kl", "divergence from the original at answer tokens that one layer's full attention removes"
)
PATH_INTEGRAL = PathIntegral(
    "path-integral",
    "gate gradients averaged from all sliding to all full; they sum to the whole gap",
    needs_gradients=True,
    sums_to_gap=True,
    separable=False,
)
