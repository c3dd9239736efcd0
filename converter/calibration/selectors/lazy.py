"""Laziness: which layers look at little but the first and the latest tokens (arXiv 2410.13846).

LightTransfer calls a layer lazy where the last rows of a prompt put most of their attention there,
and lets the lazier half slide. What differs here: the window that counts is the deployed one (the
paper's is 1020 tokens beside the sinks), and each row's own. Which layers slide is chosen anew for
every prompt there; where a choice has to serve all prompts, they vote. On some models the opposite
choice is the better one (SWAA, arXiv 2512.10411).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import fsum
from typing import TYPE_CHECKING

from converter.calibration.scores import ExampleScores, rank
from converter.calibration.selectors.base import Choice, Selector
from converter.calibration.selectors.ranking import example_scores, recorded_scores
from converter.inference.example import Example
from converter.inference.positions import TokenSpans, mass_layer_forwards
from converter.model.mask import Mask
from converter.plan.units import Units

if TYPE_CHECKING:
    from converter.calibration.evaluator import PlanEvaluator
    from converter.inference.runner import Advance, ModelRunner

# The paper's: keys at the beginning that count, and rows at the end of the prompt that are asked.
_SINKS = 4
_ROWS = 32


def measure_laziness(
    runner: ModelRunner, examples: Sequence[Example], advance: Advance
) -> list[ExampleScores]:
    """Score every layer by 1 - lazy ratio: the share of attention on what sliding would hide."""
    masses = runner.attention_mass(
        examples, advance, sinks=_SINKS, recent=runner.mask.window_tokens, last=_ROWS
    )
    return [
        example_scores(example, None, None, [1 - near for near in mass])
        for example, mass in zip(examples, masses, strict=True)
    ]


def votes(table: Sequence[Sequence[float]], keep: int) -> tuple[int, ...]:
    """All layers by descending votes for full attention; of equal ones by mean score, then index.

    Args:
        table: what each prompt says of every layer.
        keep: how many layers each prompt votes for: its least lazy ones.
    """
    counts = Counter(layer for prompt in table for layer in rank(prompt)[:keep])
    sums = [fsum(column) for column in zip(*table, strict=True)]
    return tuple(sorted(range(len(sums)), key=lambda i: (-counts[i], -sums[i], i)))


class Lazy(Selector):
    """Layers that look far back, by a vote of the prompts."""

    def choose(self, evaluator: PlanEvaluator, keep: int) -> Choice:
        """Let every prompt vote for its least lazy layers."""
        examples = recorded_scores(
            evaluator,
            "laziness",
            measure_laziness,
            lambda spans: self.cost(spans, evaluator.mask, evaluator.units, keep),
            range(len(evaluator.examples)),
            needs_gradients=self.needs_gradients,
        )
        table = [[score or 0.0 for score in one.scores] for one in examples]
        return Choice(self.order(table, keep), tuple(examples))

    def order(self, table: Sequence[Sequence[float]], keep: int) -> tuple[int, ...]:
        """As `votes`."""
        return votes(table, keep)

    def cost(self, spans: TokenSpans, mask: Mask, units: Units, keep: int) -> float:  # noqa: ARG002
        """One pass over the prompt."""
        return mass_layer_forwards(spans, units.layers, _ROWS)


LAZY = Lazy(
    "lazy",
    "layers that look far back, by a vote of the prompts (LightTransfer)",
    unit="share of attention out of sight",
    needs_gradients=True,
    tells_heads=False,
)
