"""Laziness: which layers look at little but the first and the latest tokens (arXiv 2410.13846).

LightTransfer calls a layer lazy where the last rows of a prompt put most of their attention there,
and lets the lazier half slide. What differs here: the window that counts is the deployed one (the
paper's is 1020 tokens beside the sinks), and each row's own. Which layers slide is chosen anew for
every prompt there; where a choice has to serve all prompts, they vote. On some models the opposite
choice is the better one (SWAA, arXiv 2512.10411), hence `inverted`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum
from typing import TYPE_CHECKING

from converter.calibration.selectors.base import (
    Choice,
    ExampleScores,
    Scorer,
    Selector,
    example_scores,
    rank,
)

if TYPE_CHECKING:
    from converter.calibration.evaluator import PlanEvaluator
    from converter.inference.example import Example
    from converter.inference.positions import TokenSpans
    from converter.inference.runner import Advance, ModelRunner
    from converter.model.mask import Mask

# The paper's: keys at the beginning that count, and rows at the end of the prompt that are asked.
_SINKS = 4
_ROWS = 32


def measure_laziness(
    runner: ModelRunner, examples: Sequence[Example], _layers: Sequence[int], advance: Advance
) -> list[ExampleScores]:
    """Score every layer by 1 - lazy ratio: the share of attention on what sliding would hide."""
    masses = runner.attention_mass(
        examples, advance, sinks=_SINKS, recent=runner.mask.window_tokens, last=_ROWS
    )
    return [
        example_scores(
            example, None, None, {layer: 1 - near for layer, near in enumerate(mass)}, runner.layers
        )
        for example, mass in zip(examples, masses, strict=True)
    ]


def lazy_cost(spans: TokenSpans, _mask: Mask, total: int, _layers: Sequence[int]) -> float:
    """What scoring one example costs, in layer-forwards."""
    from converter.inference.positions import mass_layer_forwards

    return mass_layer_forwards(spans, total, _ROWS)


def votes(table: Sequence[ExampleScores], keep: int, *, inverted: bool) -> tuple[int, ...]:
    """All layers in the order in which prompts vote for them to keep full attention.

    Args:
        table: what each prompt says of every layer.
        keep: how many layers each prompt votes for: its least lazy ones.
        inverted: it votes for its laziest ones.

    Returns:
        Layers by descending votes; where those are equal by mean score, then by index.
    """
    sign = -1 if inverted else 1
    scores = [[sign * score for score in e.scores if score is not None] for e in table]
    counts = [0] * len(table[0].scores)
    for prompt in scores:
        for layer in rank(prompt)[:keep]:
            counts[layer] += 1
    sums = [fsum(column) for column in zip(*scores, strict=True)]
    return tuple(sorted(range(len(counts)), key=lambda i: (-counts[i], -sums[i], i)))


LAZINESS = Scorer(
    name="laziness",
    summary="share of the last prompt rows' attention that sliding would hide",
    measure=measure_laziness,
    cost=lazy_cost,
    single=False,
    unit="share of attention out of sight",
    needs_gradients=True,
)


def _by_votes(name: str, summary: str, *, inverted: bool) -> Selector:
    def choose(evaluator: PlanEvaluator, keep: int) -> Choice:
        table = evaluator.scores(LAZINESS, range(evaluator.total))
        return Choice(votes(table, keep, inverted=inverted), tuple(table))

    def cost(spans: TokenSpans, mask: Mask, total: int, _keep: int) -> float:
        return lazy_cost(spans, mask, total, ())

    return Selector(name, summary, choose, cost, LAZINESS.unit, by_mean=False, needs_gradients=True)


LAZY = _by_votes(
    "lazy", "layers that look far back, by a vote of the prompts (LightTransfer)", inverted=False
)
LAZY_INVERTED = _by_votes(
    "lazy-inverted", "layers that look far back slide: the opposite of lazy", inverted=True
)
