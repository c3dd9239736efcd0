"""Gates learned in other ways than the product's: one a layer, or so many as may be open."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch

from converter.calibration.evaluator import PlanEvaluator
from converter.calibration.selectors.base import Choice, Selector
from converter.calibration.selectors.gates import (
    GATES,
    GateSettings,
    GradientsAt,
    LearnedGates,
    choice_by_gates,
    gradient_record,
    mean_gradients,
    recorded_gradients,
    rows_of,
)
from converter.calibration.selectors.search import typical_cost
from converter.inference.example import Example
from converter.inference.gate_gradients import GateGradients, Gates
from converter.inference.positions import TokenSpans, gradient_layer_forwards
from converter.inference.runner import Advance, ModelRunner
from converter.model.mask import FULL, Mask
from converter.plan.units import Units

# The hard concrete distribution (Louizos et al., arXiv 1712.01312): a logistic variable, squashed
# at this temperature, stretched to these ends and cut off at 0 and 1, both of which it then hits.
_TEMPERATURE = 2 / 3
_LOW, _HIGH = -0.1, 1.1
# Most gates are open at the start: then the loss has something to lose.
_FIRST_LOG_ODDS = 2.0
# In nats per layer, for each step and layer too many.
_RISE = 0.01
_BUDGETED = GateSettings(steps=320, learning_rate=0.06, passes=10)


def learn_budgeted_gates(
    gradients_at: GradientsAt,
    shape: tuple[int, int],
    settings: GateSettings,
    budget: float,
    rise: float,
) -> Gates:
    """Chances to be open that make the loss small, where `budget` gates are open on average.

    Every step draws gates from hard concrete distributions. The constraint is an augmented
    Lagrangian's: linear * excess + quadratic * excess^2, where the excess is how many more gates
    are expected to be open than may be, and both multipliers climb as the log odds descend. ConSA
    (arXiv 2606.18056) learns so for layers and for KV heads, with the weights; here they stay.

    Args:
        gradients_at: the loss.
        shape: layers, and gates of each.
        settings: how.
        budget: how many gates may be open, of all.
        rise: how fast the multipliers climb: loss per gate, for each step and gate too many.

    Returns:
        For each gate the chance that it is open, which grows with its log odds alone.
    """
    log_odds = torch.full(shape, _FIRST_LOG_ODDS, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([log_odds], lr=settings.learning_rate)
    linear = quadratic = 0.0
    for step in range(settings.steps):
        gates = _drawn(log_odds, step)
        found = gradients_at(step, rows_of(gates))
        allowed = _allowed(step / settings.steps, math.prod(shape), budget)
        excess = _chances(log_odds).sum() - allowed
        price = linear * excess + quadratic * excess**2
        (log_odds.grad,) = torch.autograd.grad(
            (gates, price), log_odds, (_tensor(found.by_gate), torch.ones_like(price))
        )
        adam.step()
        linear += rise * excess.item()
        quadratic += rise * excess.item() ** 2
    return rows_of(_chances(log_odds))


def _allowed(progress: float, all_gates: int, budget: float) -> float:
    """How many gates may be open: at first all, from half of the way on the budget.

    A budget that falls slowly closes the gates that cost least first; at once it closes them all.
    """
    return budget + (all_gates - budget) * max(0.0, 1 - 2 * progress)


def _drawn(log_odds: torch.Tensor, step: int) -> torch.Tensor:
    """Gates of one step, between 0 and 1."""
    generator = random.Random(f"gates 0 {step}")  # noqa: S311 - reproducible
    uniform = _tensor(tuple(tuple(generator.random() for _ in row) for row in log_odds))
    logistic = (uniform.logit(eps=1e-9) + log_odds) / _TEMPERATURE
    return (logistic.sigmoid() * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def _chances(log_odds: torch.Tensor) -> torch.Tensor:
    """How likely a drawn gate is not 0."""
    return (log_odds - _TEMPERATURE * math.log(-_LOW / _HIGH)).sigmoid()


def _tensor(rows: Gates) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


class BudgetedGates(Selector):
    """As many gates open as layers are kept, for the answer's loss."""

    def choose(self, evaluator: PlanEvaluator, keep: int) -> Choice:
        """The layers whose gates are most likely open."""
        # None open, or all, teaches nothing about the order.
        budget = min(max(keep, 1), evaluator.total - 1)

        def gradients_at(step: int, gates: Gates) -> GateGradients:
            def find(
                runner: ModelRunner, examples: Sequence[Example], advance: Advance
            ) -> list[dict[str, Any]]:
                found = runner.gate_gradients(examples, gates, advance)
                return [gradient_record(gradients) for gradients in found]

            drawn = _BUDGETED.drawn(step, len(evaluator.examples))
            return mean_gradients(recorded_gradients(evaluator, "answer", gates, find, drawn))

        shape = evaluator.total, 1
        chances = learn_budgeted_gates(gradients_at, shape, _BUDGETED, budget, _RISE)
        return choice_by_gates(evaluator, keep, chances)

    def cost(self, spans: TokenSpans, mask: Mask, units: Units, keep: int) -> float:
        """At most, but for a step's being no less than an example: closed gates make it less."""
        learned = _BUDGETED.passes * gradient_layer_forwards((FULL,) * units.layers, spans, mask)
        return learned + typical_cost(spans, mask, units.total + 1, units, keep)


class GatesOfLayers(LearnedGates):
    """As the product's, with one gate a layer."""

    def choose(self, evaluator: PlanEvaluator, keep: int) -> Choice:
        """The layers whose gates are highest."""
        return choice_by_gates(evaluator, keep, self.learned(evaluator, 1))


GATES_LAYERS = GatesOfLayers(
    "gates-layers", f"as {GATES.name}, with one gate a layer (as FlashMorph)", needs_gradients=True
)
GATES_BUDGET = BudgetedGates(
    "gates-budget",
    "learned gates, as many open as layers are kept, for the answer's loss (as ConSA)",
    needs_gradients=True,
)
