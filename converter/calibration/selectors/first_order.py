"""First order: the restore-one score of every layer from one forward and one backward pass.

Each layer's attention is sliding + a (full - sliding); the score is -dL_ans/da at a = 0, which is
attribution patching of `nll-restore`. It foretells small effects well and saturates where a
layer's effect is large, so a close decision should be confirmed by `nll-restore`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from converter.calibration.selectors.base import ExampleScores, Scorer, example_scores
from converter.model.mask import SLIDING

if TYPE_CHECKING:
    from converter.inference.example import Example
    from converter.inference.positions import TokenSpans
    from converter.inference.runner import Advance, ModelRunner
    from converter.model.mask import Mask


def _measure(
    runner: ModelRunner, examples: Sequence[Example], _layers: Sequence[int], advance: Advance
) -> list[ExampleScores]:
    gradients = runner.gate_gradients(examples, ((0.0,),) * runner.layers, advance)
    return [
        example_scores(
            example,
            None,
            gradient.loss,
            {layer: -slope for layer, slope in enumerate(gradient.by_layer)},
            runner.layers,
        )
        for example, gradient in zip(examples, gradients, strict=True)
    ]


def _cost(spans: TokenSpans, mask: Mask, total: int, _layers: Sequence[int]) -> float:
    from converter.inference.positions import gradient_layer_forwards

    return gradient_layer_forwards((SLIDING,) * total, spans, mask)


FIRST_ORDER = Scorer(
    name="first-order",
    summary="gradient of the all-sliding model's loss by a gate on each layer's full attention",
    measure=_measure,
    cost=_cost,
    single=False,
    needs_gradients=True,
)
