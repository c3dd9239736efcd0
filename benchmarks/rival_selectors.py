"""Ways to choose layers that are compared with the product's, and are no part of it.

`surrogate`, of which the record has figures too, is gone: a linear model of the answers' hidden
states proposed sets, and found the losses that greedy search finds at twice its cost.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rival_gates import GATES_BUDGET, GATES_LAYERS
from rival_searches import BEAM, EVOLUTION, GREEDY

from converter.calibration.evaluator import PlanEvaluator
from converter.calibration.scores import ExampleScores, means, rank
from converter.calibration.selectors import SELECTORS
from converter.calibration.selectors.base import Choice, Selector
from converter.calibration.selectors.baselines import unmeasured
from converter.calibration.selectors.lazy import LAZY, Lazy, votes
from converter.calibration.selectors.one_layer import NLL_REMOVE, NLL_RESTORE, Divergence
from converter.calibration.selectors.ranking import LayerSelector, example_scores
from converter.inference.example import Example
from converter.inference.positions import TokenSpans, gradient_layer_forwards
from converter.inference.runner import Advance, ModelRunner
from converter.model.mask import SLIDING, Mask
from converter.plan.units import Units


class TwoSided(Selector):
    """Restore-one and remove-one, weighted by how many layers will be full.

    (1 - rho) restore_l + rho remove_l with rho = K / (L - 1). If losses were pairwise additive, a
    layer's worth would go linearly from its restore-one score, where no other layer is full, to its
    remove-one score, where all others are; rho is where a plan of K full layers lies between the
    two.
    """

    def choose(self, evaluator: PlanEvaluator, keep: int) -> Choice:
        """The layers by their mean weighted score."""
        layers = range(evaluator.total)
        share = min(1.0, keep / max(1, evaluator.total - 1))
        restored = NLL_RESTORE.scores(evaluator, layers)
        removed = NLL_REMOVE.scores(evaluator, layers)
        examples = []
        for restore, remove in zip(restored, removed, strict=True):
            both = zip(restore.scores, remove.scores, strict=True)
            scores = tuple((1 - share) * (a or 0.0) + share * (b or 0.0) for a, b in both)
            examples.append(replace(restore, full=remove.full, scores=scores))
        return Choice(rank(means(examples)), tuple(examples))

    def cost(self, spans: TokenSpans, mask: Mask, units: Units, keep: int) -> float:
        """That of both."""
        both = (NLL_RESTORE, NLL_REMOVE)
        return sum(selector.cost(spans, mask, units, keep) for selector in both)


class FirstOrder(LayerSelector):
    """The restore-one score of every layer from one forward and one backward pass.

    Each layer's attention is sliding + a (full - sliding); the score is -dL_ans/da at a = 0, which
    is attribution patching of restore-one. It foretells small effects well and saturates where a
    layer's effect is large.
    """

    def measure(
        self,
        runner: ModelRunner,
        examples: Sequence[Example],
        layers: Sequence[int],  # noqa: ARG002 - a gradient has them all
        advance: Advance,
        units: Units,
    ) -> list[ExampleScores]:
        """Score every layer."""
        gradients = runner.gate_gradients(examples, units.rows([0.0] * units.total), advance)
        return [
            example_scores(example, None, gradient.loss, [-slope for slope in gradient.slopes])
            for example, gradient in zip(examples, gradients, strict=True)
        ]

    def cost_of_scoring(
        self,
        spans: TokenSpans,
        mask: Mask,
        units: Units,
        layers: Sequence[int],  # noqa: ARG002 - as many as there are
    ) -> float:
        """There and back, with all layers sliding."""
        return gradient_layer_forwards((SLIDING,) * units.layers, spans, mask)


class DivergenceEverywhere(Divergence):
    """The divergence at every token of prompt and answer."""

    every_row = True


class LazyInverted(Lazy):
    """Layers that look far back slide."""

    def order(self, table: Sequence[Sequence[float]], keep: int) -> tuple[int, ...]:
        """Prompts vote for their laziest layers."""
        return votes([[-score for score in prompt] for prompt in table], keep)


@dataclass(frozen=True)
class Fixed(Selector):
    """Layers of some place.

    Attributes:
        place: where the layers are, from 0 for the first ones to 1 for the last.
    """

    place: float = 0.0

    def choose(self, evaluator: PlanEvaluator, keep: int) -> Choice:
        """Choose by the number of layers alone."""
        begin = int((evaluator.total - keep) * self.place)
        return unmeasured(range(begin, begin + keep), evaluator.total)

    def cost(self, spans: TokenSpans, mask: Mask, units: Units, keep: int) -> float:  # noqa: ARG002
        """Nothing."""
        return 0.0


@dataclass(frozen=True)
class Drawn(Fixed):
    """Layers drawn by a seed."""

    seed: int = 0

    def choose(self, evaluator: PlanEvaluator, keep: int) -> Choice:
        """Draw."""
        rng = random.Random(self.seed)  # noqa: S311 - reproducible
        return unmeasured(sorted(rng.sample(range(evaluator.total), keep)), evaluator.total)


FIRST_ORDER = FirstOrder(
    "first-order",
    "gradient of the all-sliding model's loss by a gate on each layer's full attention",
    needs_gradients=True,
    separable=False,
)
TWO_SIDED = TwoSided(
    "two-sided", "restore-one and remove-one, weighted by how many layers the budget keeps"
)
RIVALS: dict[str, Selector] = {
    rival.name: rival
    for rival in (
        DivergenceEverywhere(
            "kl-all",
            "divergence from the original at every token of prompt and answer",
            unit="nats per token",
            needs_gradients=True,
        ),
        FIRST_ORDER,
        TWO_SIDED,
        GREEDY,
        LazyInverted(
            "lazy-inverted",
            "layers that look far back slide: the opposite of lazy",
            unit=LAZY.unit,
            needs_gradients=True,
        ),
        GATES_LAYERS,
        GATES_BUDGET,
        BEAM,
        EVOLUTION,
        Fixed("first", "the first layers", measures=False),
        Fixed("last", "the last layers", measures=False, place=1.0),
        Fixed("middle", "the layers in the middle", measures=False, place=0.5),
        *(
            Drawn(f"random, seed {seed}", "layers drawn", measures=False, seed=seed)
            for seed in range(3)
        ),
    )
}
EVERY_SELECTOR = SELECTORS | RIVALS
