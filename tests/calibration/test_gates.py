"""Learned gates: on losses whose best gates are known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch

from converter.calibration.gates.learning import learn_budgeted_gates, learn_gates
from converter.calibration.gates.settings import GateSettings
from converter.inference.gate_gradients import GateGradients, Gates

Table = Sequence[Sequence[float]]


def best(values: Sequence[float], count: int) -> set[int]:
    """Where the highest values stand."""
    return set(sorted(range(len(values)), key=lambda i: -values[i])[:count])


class Loss:
    """An oracle of a loss written down in torch; it remembers what it was asked."""

    def __init__(self, loss: Callable[[torch.Tensor], torch.Tensor], noise: float = 0.0) -> None:
        self._loss = loss
        self._noise = noise
        self.asked: list[tuple[int, Gates]] = []

    def __call__(self, step: int, gates: Gates) -> GateGradients:
        """As `Oracle`; the noise of a step is always the same."""
        self.asked.append((step, gates))
        table = torch.tensor(gates, dtype=torch.float64, requires_grad=True)
        loss = self._loss(table)
        (slope,) = torch.autograd.grad(loss, table)
        noise = torch.randn(slope.shape, generator=torch.Generator().manual_seed(step))
        slope = slope + self._noise * noise
        return GateGradients(loss.item(), tuple(map(tuple, slope.tolist())))


def squares(worth: Table) -> Loss:
    """Each gate's worth times half the square of what it lacks to 1."""
    weights = torch.tensor(worth, dtype=torch.float64)
    return Loss(lambda gates: (weights * (1 - gates) ** 2).sum() / 2)


def sums(worth: Table, noise: float = 0.0) -> Loss:
    """Each gate's worth times what it lacks to 1."""
    weights = torch.tensor(worth, dtype=torch.float64)
    return Loss(lambda gates: (weights * (1 - gates)).sum(), noise)


@pytest.mark.parametrize(
    "worth", [((4.0,), (0.5,), (1.0,), (0.05,), (0.0,)), ((2.0, 0.1), (0.0, 0.6), (0.3, 0.2))]
)
def test_gates_settle_where_the_loss_pays_for_them(worth: Table) -> None:
    """Loss and penalty have slopes that cancel at 1 - sparsity / (gates * worth), or at 0."""
    sparsity = 1.5
    shape = len(worth), len(worth[0])
    oracle = squares(worth)
    learn_gates(oracle, shape, GateSettings(600, 0.02), sparsity)
    for row, weights in zip(oracle.asked[-1][1], worth, strict=True):
        price = sparsity / math.prod(shape)
        wanted = [1 - price / weight if weight > price else 0.0 for weight in weights]
        assert row == pytest.approx(wanted, abs=1e-3)
        assert all(gate == 0 for gate, at in zip(row, wanted, strict=True) if at == 0)


def test_the_steps_are_those_of_adam_and_the_result_is_their_mean() -> None:
    """Against the update written out (arXiv 1412.6980), step by step."""
    worth, steps = [3.0, 0.2, 0.7], 25
    oracle = squares([[weight] for weight in worth])
    found = learn_gates(oracle, (3, 1), GateSettings(steps, 0.03), 0.6)
    gates, first, second, sums = [1.0] * 3, [0.0] * 3, [0.0] * 3, [0.0] * 3
    assert [step for step, _ in oracle.asked] == list(range(steps))
    for step, (_, asked) in enumerate(oracle.asked, start=1):
        assert [row[0] for row in asked] == pytest.approx(gates, abs=1e-12)
        for i, weight in enumerate(worth):
            slope = -weight * (1 - gates[i]) + 0.6 / 3
            first[i] = 0.9 * first[i] + 0.1 * slope
            second[i] = 0.999 * second[i] + 0.001 * slope**2
            down = first[i] / (1 - 0.9**step)
            size = math.sqrt(second[i] / (1 - 0.999**step)) + 1e-8
            gates[i] = min(1.0, max(0.0, gates[i] - 0.03 * down / size))
            sums[i] += gates[i]
    assert [row[0] for row in found] == pytest.approx([s / steps for s in sums], abs=1e-12)


def test_of_gates_that_end_closed_the_one_held_open_longer_comes_first() -> None:
    asked: list[Gates] = []

    def oracle(step: int, gates: Gates) -> GateGradients:
        """Nobody needs the first; the second for some steps, the third for more."""
        asked.append(gates)
        return GateGradients(0.0, ((0.0,), (-1.0 * (step < 20),), (-1.0 * (step < 60),)))

    first, second, third = learn_gates(oracle, (3, 1), GateSettings(300, 0.05), 0.6)
    assert asked[-1] == ((0.0,),) * 3
    assert third[0] > second[0] > first[0] > 0


@pytest.mark.parametrize("budget", [1, 2, 4])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_budget_goes_to_what_is_worth_most(budget: int, noise: float) -> None:
    worth = [[0.1, 2.0], [0.3, 0.0], [1.5, 0.9], [0.05, 0.2]]
    chances = learn_budgeted_gates(
        sums(worth, noise), (4, 2), GateSettings(400, 0.05), budget, 0.05
    )
    flat = [chance for row in chances for chance in row]
    assert best(flat, budget) == best([w for row in worth for w in row], budget)
    assert sum(flat) == pytest.approx(budget, abs=0.5)


def test_layers_that_work_together_are_found() -> None:
    """Each alone does nothing, so that the slopes at the sliding end praise another layer."""

    def loss(gates: torch.Tensor) -> torch.Tensor:
        a = gates[:, 0]
        return 1 - a[1] * a[4] + 0.3 * (1 - a[2])

    def of_set(kept: Sequence[int]) -> float:
        return float(loss(torch.tensor([[float(i in kept)] for i in range(6)])))

    def values(gates: Gates) -> list[float]:
        return [gate for (gate,) in gates]

    optimum = set(min(itertools.combinations(range(6), 2), key=of_set))
    slopes = values(Loss(loss)(0, ((0.0,),) * 6).by_gate)
    assert optimum == {1, 4}
    assert best([-slope for slope in slopes], 1) == {2}
    budgeted = learn_budgeted_gates(Loss(loss), (6, 1), GateSettings(400, 0.05), 2, 0.05)
    assert best(values(budgeted), 2) == optimum
    sparse = learn_gates(Loss(loss), (6, 1), GateSettings(300, 0.02), 2.4)
    assert best(values(sparse), 2) == optimum


def test_drawn_gates_are_hard_concrete() -> None:
    """How often they are 0 and 1, by the distribution's closed form (arXiv 1712.01312)."""
    oracle = sums([[0.0]] * 40)
    chances = learn_budgeted_gates(oracle, (40, 1), GateSettings(400, 0.0), 20, 0.0)
    drawn = [gate for _, gates in oracle.asked for (gate,) in gates]
    # A learning rate of 0 leaves the log odds where they begin.
    log_odds = 2.0
    open_, whole = (
        1 / (1 + math.exp(-log_odds + 2 / 3 * math.log(odds))) for odds in (0.1 / 1.1, 1.1 / 0.1)
    )
    assert chances[0][0] == pytest.approx(open_)
    assert sum(gate > 0 for gate in drawn) / len(drawn) == pytest.approx(open_, abs=0.01)
    assert sum(gate == 1 for gate in drawn) / len(drawn) == pytest.approx(whole, abs=0.015)
    assert all(0 <= gate <= 1 for gate in drawn)
    other = sums([[0.0]] * 40)
    settings = GateSettings(400, 0.0, seed=1)
    learn_budgeted_gates(other, (40, 1), settings, 20, 0.0)
    assert other.asked != oracle.asked
