"""Two ways to learn gates from the derivatives of a loss.

A gate of 1 is full attention, one of 0 sliding attention (see
`converter.inference.gate_gradients`). What
is drawn in a step depends on the seed and the step alone, and the loss is asked in order: whoever
answers a second run as the first was answered sees it repeat itself to the last bit.
"""

from __future__ import annotations

import math
import random
from typing import Protocol

import torch

from converter.calibration.gates.settings import GateSettings
from converter.inference.gate_gradients import GateGradients, Gates

# The hard concrete distribution (Louizos et al., arXiv 1712.01312): a logistic variable, squashed
# at this temperature, stretched to these ends and cut off at 0 and 1, both of which it then hits.
_TEMPERATURE = 2 / 3
_LOW, _HIGH = -0.1, 1.1
# Most gates are open at the start: then the loss has something to lose.
_FIRST_LOG_ODDS = 2.0


class Oracle(Protocol):
    """Says what the gates do to the loss."""

    def __call__(self, step: int, gates: Gates) -> GateGradients:
        """The loss and its derivatives at these gates, on the examples of a step."""


def learn_gates(
    oracle: Oracle, shape: tuple[int, int], settings: GateSettings, sparsity: float
) -> Gates:
    """Gates in [0, 1] that make the loss + `sparsity` * the mean gate small, from all at 1.

    Made for the distance to the full model's hidden states: DuoAttention (arXiv 2410.10819) has one
    for every KV head, FlashMorph (arXiv 2606.30562) for every layer. Both take the gates as they
    end. Here they are averaged over the steps, since many end at 0: of those the average tells
    which was held open longer.

    Args:
        oracle: the loss.
        shape: layers, and gates of each.
        settings: how.
        sparsity: what the mean gate costs, in the loss's unit.

    Returns:
        Each gate's mean over the steps.
    """
    gates = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([gates], lr=settings.learning_rate)
    passed = torch.zeros(shape, dtype=torch.float64)
    for step in range(settings.steps):
        found = oracle(step, _rows(gates))
        # Gates are never negative, so the mean of their sizes has the same slope everywhere.
        gates.grad = _tensor(found.by_gate) + sparsity / math.prod(shape)
        adam.step()
        with torch.no_grad():
            passed += gates.clamp_(0, 1)
    return _rows(passed / settings.steps)


def learn_budgeted_gates(
    oracle: Oracle, shape: tuple[int, int], settings: GateSettings, budget: float, rise: float
) -> Gates:
    """Chances to be open that make the loss small, where `budget` gates are open on average.

    Every step draws gates from hard concrete distributions. The constraint is an augmented
    Lagrangian's: linear * excess + quadratic * excess^2, where the excess is how many more gates
    are expected to be open than may be, and both multipliers climb as the log odds descend. ConSA
    (arXiv 2606.18056) learns so for layers and for KV heads, with the weights; here they stay.

    Args:
        oracle: the loss.
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
        gates = _drawn(log_odds, settings.seed, step)
        found = oracle(step, _rows(gates))
        allowed = _allowed(step / settings.steps, math.prod(shape), budget)
        excess = _chances(log_odds).sum() - allowed
        price = linear * excess + quadratic * excess**2
        (log_odds.grad,) = torch.autograd.grad(
            (gates, price), log_odds, (_tensor(found.by_gate), torch.ones_like(price))
        )
        adam.step()
        linear += rise * excess.item()
        quadratic += rise * excess.item() ** 2
    return _rows(_chances(log_odds))


def _allowed(progress: float, all_gates: int, budget: float) -> float:
    """How many gates may be open: at first all, from half of the way on the budget.

    A budget that falls slowly closes the gates that cost least first; at once it closes them all.
    """
    return budget + (all_gates - budget) * max(0.0, 1 - 2 * progress)


def _drawn(log_odds: torch.Tensor, seed: int, step: int) -> torch.Tensor:
    """Gates of one step, between 0 and 1."""
    generator = random.Random(f"gates {seed} {step}")  # noqa: S311 - reproducible
    uniform = _tensor(tuple(tuple(generator.random() for _ in row) for row in log_odds))
    logistic = (uniform.logit(eps=1e-9) + log_odds) / _TEMPERATURE
    return (logistic.sigmoid() * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def _chances(log_odds: torch.Tensor) -> torch.Tensor:
    """How likely a drawn gate is not 0."""
    return (log_odds - _TEMPERATURE * math.log(-_LOW / _HIGH)).sigmoid()


def _tensor(rows: Gates) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def _rows(table: torch.Tensor) -> Gates:
    return tuple(map(tuple, table.tolist()))
