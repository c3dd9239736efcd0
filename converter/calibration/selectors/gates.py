"""Gates: layers whose gate between sliding and full attention stays open when gates are learned.

All weights stay as they are. `gates` learns one gate a layer against the distance to the
original's hidden states and a price on open gates, as FlashMorph (arXiv 2606.30562) does, and
`gates-heads` one for every KV head, as DuoAttention (arXiv 2410.10819) does. `gates-budget` lets as
many gates be open as layers are kept and makes the answer's loss small, as ConSA (arXiv 2606.18056)
does. The price of those papers has a unit; here it is a share of what sliding in all layers costs.

What a step needs of an example is kept under the gates that it was asked at. So a killed run goes
the same way again, through what is known, and on from there.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from math import fsum
from typing import TYPE_CHECKING

from converter.calibration.gates.settings import GateSettings
from converter.calibration.selectors.base import Choice, Selector, rank
from converter.calibration.selectors.searching import choice_around, typical_cost
from converter.model.mask import FULL, SLIDING

if TYPE_CHECKING:
    import torch

    from converter.calibration.cache import Record
    from converter.calibration.evaluator import PlanEvaluator
    from converter.inference.example import Example
    from converter.inference.gate_gradients import GateGradients, Gates
    from converter.inference.positions import TokenSpans
    from converter.inference.runner import Advance, ModelRunner
    from converter.model.mask import Mask

# How often every example is read, about as often as by the path integral.
_SPARSE, _SPARSE_PASSES = GateSettings(steps=60, learning_rate=0.05), 8
_BUDGETED, _BUDGETED_PASSES = GateSettings(steps=320, learning_rate=0.06), 10
# The price of all gates together, as a share of what closing them all costs: a gate stays open if
# it is worth more than this share of an even part. So it does not depend on depth, or on units.
_SPARSITY = 0.25
# In nats per layer, for each step and layer too many.
_RISE = 0.01


class EvaluatorGradients:
    """Means over examples of a study, as `converter.calibration.gates.learning.Oracle`.

    Args:
        evaluator: keeps what is found of each example.
        settings: how gates are learned.
        passes: how often all steps together read each example; a step reads one at least.
        hidden: whether the loss is the mean squared difference of what the output head reads from
            what it reads in the original; else it is the answer's NLL.
    """

    def __init__(
        self, evaluator: PlanEvaluator, settings: GateSettings, passes: int, *, hidden: bool
    ) -> None:
        self._evaluator = evaluator
        self._everything = range(len(evaluator.examples))
        self._seed = settings.seed
        self._batch = max(1, round(len(evaluator.examples) * passes / settings.steps))
        self._hidden = hidden
        # What the head reads in the original.
        self._targets: dict[Example, torch.Tensor] = {}

    def __call__(self, step: int, gates: Gates) -> GateGradients:
        """The loss and its derivatives at these gates, on the examples that a step draws."""
        generator = random.Random(f"{self._seed} {step}")  # noqa: S311 - reproducible
        return self._mean(gates, generator.sample(self._everything, self._batch))

    def all_sliding(self, width: int) -> float:
        """The loss on all examples where every layer has so many gates, all closed."""
        return self._mean(((0.0,) * width,) * self._evaluator.total, self._everything).loss

    def _mean(self, gates: Gates, places: Sequence[int]) -> GateGradients:
        from converter.inference.gate_gradients import GateGradients, gate_layer_types
        from converter.inference.positions import gradient_layer_forwards, token_spans

        mask, kinds = self._evaluator.mask, gate_layer_types(gates)
        # Where all gates are closed the targets are found too: `all_sliding` comes first.
        first = self._hidden and FULL not in kinds

        def find(
            runner: ModelRunner, examples: Sequence[Example], advance: Advance
        ) -> Sequence[Record]:
            targets = None
            if self._hidden:
                # Later they only lack where an earlier run, or another process, was there first.
                targets = self._targets_of(runner, examples, advance if first else _ignore)
            return [_record(g) for g in runner.gate_gradients(examples, gates, advance, targets)]

        def cost(example: Example) -> float:
            gradient = gradient_layer_forwards(kinds, token_spans(example, mask), mask)
            return gradient + (self._evaluator.total if first else 0)

        digest = hashlib.sha256(json.dumps(gates).encode()).hexdigest()[:16]
        name = f"gates {'hidden' if self._hidden else 'answer'} {digest}"
        found = self._evaluator.records(name, find, cost, places, needs_gradients=True)
        tables = zip(*(record["by_gate"] for record in found), strict=True)
        by_gate = [[_average(slopes) for slopes in zip(*rows, strict=True)] for rows in tables]
        return GateGradients(
            _average([record["loss"] for record in found]), tuple(map(tuple, by_gate))
        )

    def _targets_of(
        self, runner: ModelRunner, examples: Sequence[Example], advance: Advance
    ) -> list[torch.Tensor]:
        missing = [example for example in examples if example not in self._targets]
        if missing:
            self._targets |= zip(missing, runner.full_states(missing, advance), strict=True)
        return [self._targets[example] for example in examples]


def _record(found: GateGradients) -> Record:
    from converter.calibration.evaluator import finite

    by_gate = [[finite(slope) for slope in row] for row in found.by_gate]
    return {"loss": finite(found.loss), "by_gate": by_gate}


def _average(values: Sequence[float]) -> float:
    return fsum(values) / len(values)


def _ignore(_: float) -> None:
    """Takes notice of no progress."""


def _sparse_gates(evaluator: PlanEvaluator, width: int) -> Gates:
    """Gates, so many a layer, that keep the hidden states close to the original's."""
    from converter.calibration.gates.learning import learn_gates

    gradients = EvaluatorGradients(evaluator, _SPARSE, _SPARSE_PASSES, hidden=True)
    price = _SPARSITY * gradients.all_sliding(width)
    return learn_gates(gradients, (evaluator.total, width), _SPARSE, price)


def _choice_of(evaluator: PlanEvaluator, keep: int, gates: Gates) -> Choice:
    """The layers whose gates are highest on average."""
    order = rank([_average(row) for row in gates])
    return choice_around(evaluator, frozenset(order[:keep]), order)


def _choose(evaluator: PlanEvaluator, keep: int) -> Choice:
    return _choice_of(evaluator, keep, _sparse_gates(evaluator, 1))


def _choose_by_heads(evaluator: PlanEvaluator, keep: int) -> Choice:
    gates = _sparse_gates(evaluator, evaluator.kv_heads)
    return replace(_choice_of(evaluator, keep, gates), heads=gates)


def _choose_for_budget(evaluator: PlanEvaluator, keep: int) -> Choice:
    from converter.calibration.gates.learning import learn_budgeted_gates

    gradients = EvaluatorGradients(evaluator, _BUDGETED, _BUDGETED_PASSES, hidden=False)
    # None open, or all, teaches nothing about the order.
    budget = min(max(keep, 1), evaluator.total - 1)
    chances = learn_budgeted_gates(gradients, (evaluator.total, 1), _BUDGETED, budget, _RISE)
    return _choice_of(evaluator, keep, chances)


def _cost(spans: TokenSpans, mask: Mask, total: int, _keep: int) -> float:
    """At most, but for a step's being no less than an example: gates that close make it less."""
    closed = _gradient_cost(spans, mask, total, SLIDING) + total
    learned = _SPARSE_PASSES * _gradient_cost(spans, mask, total, FULL)
    return closed + learned + typical_cost(spans, mask, total + 1, total)


def _budget_cost(spans: TokenSpans, mask: Mask, total: int, _keep: int) -> float:
    """As `_cost`."""
    learned = _BUDGETED_PASSES * _gradient_cost(spans, mask, total, FULL)
    return learned + typical_cost(spans, mask, total + 1, total)


def _gradient_cost(spans: TokenSpans, mask: Mask, total: int, kind: str) -> float:
    from converter.inference.positions import gradient_layer_forwards

    return gradient_layer_forwards((kind,) * total, spans, mask)


GATES = Selector(
    name="gates",
    summary="learned gates that stay open: hidden states close to the original's (as FlashMorph)",
    choose=_choose,
    cost=_cost,
    by_mean=False,
    needs_gradients=True,
)
GATES_BUDGET = Selector(
    name="gates-budget",
    summary="learned gates, as many open as layers are kept, for the answer's loss (as ConSA)",
    choose=_choose_for_budget,
    cost=_budget_cost,
    by_mean=False,
    needs_gradients=True,
)
GATES_HEADS = Selector(
    name="gates-heads",
    summary="as gates, with a gate for every KV head, which are printed (as DuoAttention)",
    choose=_choose_by_heads,
    cost=_cost,
    by_mean=False,
    needs_gradients=True,
)
