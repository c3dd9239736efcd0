"""Restore-one by KL: what one layer's full attention takes off the distance to the full model.

D_l = KL(all FA || all SWA) - KL(all FA || all SWA, layer l FA), of next-token distributions
(KL-guided layer selection, arXiv 2512.20569). The full model is the teacher: answers need not be
right. In the paper the cheap layers are linear attention and take a little training on generic text
before they are scored; here nothing is trained, and the texts are those of the calibration.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from converter.calibration.selectors.base import ExampleScores, Scorer, example_scores
from converter.model.mask import SLIDING
from converter.plan.plan import switched_plans

if TYPE_CHECKING:
    from converter.inference.example import Example
    from converter.inference.positions import TokenSpans
    from converter.inference.runner import Advance, ModelRunner
    from converter.model.mask import Mask


def measure_kl(
    runner: ModelRunner,
    examples: Sequence[Example],
    layers: Sequence[int],
    advance: Advance,
    *,
    every_row: bool,
) -> list[ExampleScores]:
    """Score layers, in nats per row.

    Args:
        runner: the model.
        examples: what to read.
        layers: which to score.
        advance: told how many layer-forwards have been done.
        every_row: over all rows of the examples; else over those that predict the answer.
    """
    plans = switched_plans(SLIDING, layers, runner.layers)
    divergences = runner.divergences(examples, plans, advance, every_row=every_row)
    measured = []
    for example, (uniform, *restored) in zip(examples, divergences, strict=True):
        scores = {layer: uniform - left for layer, left in zip(layers, restored, strict=True)}
        measured.append(example_scores(example, None, None, scores, runner.layers))
    return measured


def kl_cost(
    spans: TokenSpans, mask: Mask, total: int, layers: Sequence[int], *, every_row: bool
) -> float:
    """What scoring one example costs, in layer-forwards."""
    from converter.inference.positions import divergence_layer_forwards

    plans = switched_plans(SLIDING, layers, total)
    return divergence_layer_forwards(plans, spans, mask, every_row=every_row)


KL = Scorer(
    name="kl",
    summary="divergence from the original at answer tokens that one layer's full attention removes",
    measure=partial(measure_kl, every_row=False),
    cost=partial(kl_cost, every_row=False),
    single=True,
)
KL_ALL = Scorer(
    name="kl-all",
    summary="the same at every token of prompt and answer",
    measure=partial(measure_kl, every_row=True),
    cost=partial(kl_cost, every_row=True),
    single=True,
    unit="nats per token",
    needs_gradients=True,
)
