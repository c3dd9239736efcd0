"""Two ways to learn gates from the derivatives of a loss.

A gate of 1 is full attention, one of 0 sliding attention (see `converter.forward.gradient`). Every
step makes the next `GateState` of the last one and of nothing else, so that a run goes on from any
of them as if it had not stopped.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import torch

from converter.forward.gradient import Gates
from converter.gates.state import GateSettings, GateState, Oracle, start_state

# The hard concrete distribution (Louizos et al., arXiv 1712.01312): a logistic variable, squashed
# at this temperature, stretched to these ends and cut off at 0 and 1, both of which it then hits.
_TEMPERATURE = 2 / 3
_LOW, _HIGH = -0.1, 1.1
# Most gates are open at the start: then the loss has something to lose.
_FIRST_LOG_ODDS = 2.0


def learn_gates(
    oracle: Oracle,
    shape: tuple[int, int],
    settings: GateSettings,
    sparsity: float,
    on_step: Callable[[GateState], None],
    start: GateState | None = None,
) -> Gates:
    """Gates in [0, 1] that make the loss + `sparsity` * the mean gate small, from all at 1.

    Made for the distance to the full model's hidden states: DuoAttention (arXiv 2410.10819) has one
    for every KV head, FlashMorph (arXiv 2606.30562) for every layer.

    Args:
        oracle: the loss.
        shape: layers, and gates of each.
        settings: how.
        sparsity: what the mean gate costs, in the loss's unit.
        on_step: is told the state after each step.
        start: such a state, to go on from.

    Returns:
        The gates.
    """
    state = start or start_state(shape, 1.0)
    while state.step < settings.steps:
        found = oracle(state.step, state.parameters)
        # Gates are never negative, so the mean of their sizes has the same slope everywhere.
        slope = _tensor(found.by_gate) + sparsity / math.prod(shape)
        moved = _after_adam(state, slope, settings.learning_rate)
        gates = _tensor(moved.parameters).clamp(0, 1)
        state = replace(moved, parameters=_rows(gates), loss=found.loss)
        on_step(state)
    return state.parameters


def learn_budgeted_gates(
    oracle: Oracle,
    shape: tuple[int, int],
    settings: GateSettings,
    budget: float,
    rise: float,
    on_step: Callable[[GateState], None],
    start: GateState | None = None,
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
        on_step: is told the state after each step.
        start: such a state, to go on from.

    Returns:
        For each gate the chance that it is open, which grows with its log odds alone.
    """
    state = start or start_state(shape, _FIRST_LOG_ODDS)
    while state.step < settings.steps:
        log_odds = _tensor(state.parameters).requires_grad_()
        gates = _drawn(log_odds, settings.seed, state.step)
        found = oracle(state.step, _rows(gates.detach()))
        allowed = _allowed(state.step / settings.steps, math.prod(shape), budget)
        excess = _chances(log_odds).sum() - allowed
        linear, quadratic = state.multipliers
        price = linear * excess + quadratic * excess**2
        (slope,) = torch.autograd.grad(
            (gates, price), log_odds, (_tensor(found.by_gate), torch.ones_like(price))
        )
        over = excess.item()
        state = replace(
            _after_adam(state, slope, settings.learning_rate),
            multipliers=(linear + rise * over, quadratic + rise * over**2),
            loss=found.loss,
        )
        on_step(state)
    return _rows(_chances(_tensor(state.parameters)))


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


def _after_adam(state: GateState, slope: torch.Tensor, learning_rate: float) -> GateState:
    """The state after a step of Adam, but for what only the caller knows."""
    parameters = _tensor(state.parameters).requires_grad_()
    parameters.grad = slope
    adam = torch.optim.Adam([parameters], lr=learning_rate)
    adam.state[parameters] = {
        "step": torch.tensor(float(state.step)),
        "exp_avg": _tensor(state.first_moments),
        "exp_avg_sq": _tensor(state.second_moments),
    }
    adam.step()
    moments = adam.state[parameters]
    return replace(
        state,
        step=state.step + 1,
        parameters=_rows(parameters.detach()),
        first_moments=_rows(moments["exp_avg"]),
        second_moments=_rows(moments["exp_avg_sq"]),
    )


def _tensor(rows: Gates) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def _rows(table: torch.Tensor) -> Gates:
    return tuple(map(tuple, table.tolist()))
