"""Gates: layers whose KV heads' gates between sliding and full attention stay open when learned.

All weights stay as they are. There is one gate for every KV head, as DuoAttention (arXiv
2410.10819) has, learned against the distance to the original's hidden states and a price on open
gates; FlashMorph (arXiv 2606.30562) does so for layers. A layer's gate is the mean of its heads'.
The price of those papers has a unit; here it is a share of what sliding in all layers costs.

What a step needs of an example is kept under the gates that it was asked at. So a killed run goes
the same way again, through what is known, and on from there.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING

from converter.calibration.scores import rank
from converter.calibration.selectors.base import Choice, Selector
from converter.calibration.selectors.search import choice_around, typical_cost
from converter.inference.example import Example
from converter.inference.positions import TokenSpans, gradient_layer_forwards
from converter.model.mask import FULL, SLIDING, Mask
from converter.plan.units import Units

if TYPE_CHECKING:
    import torch

    from converter.calibration.evaluator import PlanEvaluator
    from converter.calibration.run import Find
    from converter.inference.gate_gradients import GateGradients, Gates
    from converter.inference.runner import Advance, ModelRunner

# The loss and its derivatives at some gates, on the examples of a step.
GradientsAt = Callable[[int, "Gates"], "GateGradients"]


@dataclass(frozen=True)
class GateSettings:
    """How gates are learned.

    Attributes:
        steps: of Adam.
        learning_rate: of Adam, for each step.
        passes: how often all steps together read each example; a step reads one at least.
    """

    steps: int
    learning_rate: float
    passes: int

    def drawn(self, step: int, examples: int) -> list[int]:
        """Which of so many examples a step reads; by the step alone."""
        batch = max(1, round(examples * self.passes / self.steps))
        generator = random.Random(f"0 {step}")  # noqa: S311 - reproducible
        return generator.sample(range(examples), batch)


def learn_gates(
    gradients_at: GradientsAt, shape: tuple[int, int], settings: GateSettings, sparsity: float
) -> Gates:
    """Gates in [0, 1] that make the loss + `sparsity` * the mean gate small, from all at 1.

    The papers take the gates as they end. Here they are averaged over the steps, since many end at
    0: of those the average tells which was held open longer.

    Args:
        gradients_at: the loss.
        shape: layers, and gates of each.
        settings: how.
        sparsity: what the mean gate costs, in the loss's unit.
    """
    import torch

    gates = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([gates], lr=settings.learning_rate)
    passed = torch.zeros(shape, dtype=torch.float64)
    for step in range(settings.steps):
        found = gradients_at(step, rows_of(gates))
        # Gates are never negative, so the mean of their sizes has the same slope everywhere.
        gates.grad = torch.tensor(found.by_gate, dtype=torch.float64) + sparsity / math.prod(shape)
        adam.step()
        with torch.no_grad():
            passed += gates.clamp_(0, 1)
    return rows_of(passed / settings.steps)


def rows_of(table: torch.Tensor) -> Gates:
    """Gates from a (layers, gates of each) tensor."""
    return tuple(map(tuple, table.tolist()))


def recorded_gradients(
    evaluator: PlanEvaluator,
    loss: str,
    gates: Gates,
    find: Find,
    indices: Sequence[int],
    *,
    beside: float = 0.0,
) -> list[GateGradients]:
    """A loss and its derivatives on some examples, each example's found once.

    Args:
        find: makes each example's record, as `gradient_record` does.
        beside: layer-forwards an example that `find` takes beside the gradient's.
    """
    from converter.inference.gate_gradients import GateGradients, gate_layer_types

    mask, kinds = evaluator.mask, gate_layer_types(gates)
    digest = hashlib.sha256(json.dumps(gates).encode()).hexdigest()[:16]
    found = evaluator.records(
        f"gates {loss} {digest}",
        find,
        lambda one: gradient_layer_forwards(kinds, evaluator.spans(one), mask) + beside,
        indices,
        needs_gradients=True,
    )
    return [GateGradients(record["loss"], tuple(map(tuple, record["by_gate"]))) for record in found]


def mean_gradients(found: Sequence[GateGradients]) -> GateGradients:
    """The mean of a loss and of its derivatives."""
    from converter.inference.gate_gradients import GateGradients

    tables = zip(*(one.by_gate for one in found), strict=True)
    by_gate = [tuple(map(fmean, zip(*rows, strict=True))) for rows in tables]
    return GateGradients(fmean(one.loss for one in found), tuple(by_gate))


def gradient_record(found: GateGradients) -> dict[str, object]:
    """An example's loss and derivatives, as they are kept."""
    return {"loss": found.loss, "by_gate": [list(row) for row in found.by_gate]}


@dataclass(frozen=True)
class HiddenStateGradients:
    """Of the mean squared difference of what the head reads from what it reads originally."""

    evaluator: PlanEvaluator
    settings: GateSettings
    # What the head reads in the original.
    _targets: dict[Example, torch.Tensor] = field(default_factory=dict, init=False)

    def __call__(self, step: int, gates: Gates) -> GateGradients:
        """The loss and its derivatives at these gates, on the examples that a step draws."""
        drawn = self.settings.drawn(step, len(self.evaluator.examples))
        return self._on(drawn, gates, first=False)

    def all_sliding(self, width: int) -> float:
        """The loss on all examples where every layer has so many gates, all closed."""
        gates = ((0.0,) * width,) * self.evaluator.units.layers
        return self._on(range(len(self.evaluator.examples)), gates, first=True).loss

    def _on(self, indices: Sequence[int], gates: Gates, *, first: bool) -> GateGradients:
        # The targets are found, and count, the first time that the examples are read. Later they
        # only lack where an earlier run, or another process, was there first.
        def find(
            runner: ModelRunner, examples: Sequence[Example], advance: Advance
        ) -> list[dict[str, object]]:
            if missing := [example for example in examples if example not in self._targets]:
                states = runner.full_states(missing, advance if first else lambda _: None)
                self._targets.update(zip(missing, states, strict=True))
            targets = [self._targets[example] for example in examples]
            found = runner.gate_gradients(examples, gates, advance, targets)
            return [gradient_record(gradients) for gradients in found]

        beside = self.evaluator.shape.layers if first else 0
        found = recorded_gradients(self.evaluator, "hidden", gates, find, indices, beside=beside)
        return mean_gradients(found)


@dataclass(frozen=True)
class LearnedGates(Selector):
    """Layers by the mean of their KV heads' gates.

    Attributes:
        settings: how gates are learned; every example is read about as often as by the path
            integral.
        sparsity: the price of all gates together, as a share of what closing them all costs: a gate
            stays open if it is worth more than this share of an even part. So it does not depend on
            depth, or on units.
    """

    settings: GateSettings = GateSettings(steps=60, learning_rate=0.05, passes=8)
    sparsity: float = 0.25

    def choose(self, evaluator: PlanEvaluator, keep: int) -> Choice:
        """The layers whose gates are highest on average, or the KV heads."""
        gates = self.learned(evaluator, evaluator.kv_heads)
        return replace(choice_by_gates(evaluator, keep, gates), heads=gates)

    def learned(self, evaluator: PlanEvaluator, width: int) -> Gates:
        """Gates, so many a layer, that keep the hidden states close to the original's."""
        gradients = HiddenStateGradients(evaluator, self.settings)
        price = self.sparsity * gradients.all_sliding(width)
        return learn_gates(gradients, (evaluator.units.layers, width), self.settings, price)

    def cost(self, spans: TokenSpans, mask: Mask, units: Units, keep: int) -> float:
        """At most, but for a step's being no less than an example: closed gates make it less."""
        depth = units.layers
        closed = gradient_layer_forwards((SLIDING,) * depth, spans, mask) + spans.depth(depth)
        learned = self.settings.passes * gradient_layer_forwards((FULL,) * depth, spans, mask)
        return closed + learned + typical_cost(spans, mask, units.total + 1, units, keep)


def choice_by_gates(evaluator: PlanEvaluator, keep: int, gates: Gates) -> Choice:
    """The units whose gates are highest: KV heads, or layers on average."""
    heads = evaluator.units.of_heads
    order = rank([gate for row in gates for gate in (row if heads else [fmean(row)])])
    return choice_around(evaluator, frozenset(order[:keep]), order)


GATES = LearnedGates(
    "gates",
    "learned gates of KV heads, averaged for a layer and printed: hidden states close to the "
    "original's (as DuoAttention)",
    needs_gradients=True,
)
