"""Learned gates: losses whose best gates are known, runs that are cut short, and a real model."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from converter.data import Example
from converter.forward.gradient import GateGradients, Gates
from converter.gates.examples import ExamplesOracle
from converter.gates.learning import learn_budgeted_gates, learn_gates
from converter.gates.state import GateSettings, GateState, layer_values
from converter.pipeline import Work, measurement_of
from converter.settings import Settings
from converter.source import open_source
from tests.conftest import DEMO
from tests.meters import ignore, silent

Table = Sequence[Sequence[float]]


def forget(_: GateState) -> None:
    """Keep no state."""


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
    found = learn_gates(squares(worth), shape, GateSettings(600, 0.02, 1), sparsity, forget)
    for row, weights in zip(found, worth, strict=True):
        price = sparsity / math.prod(shape)
        wanted = [1 - price / weight if weight > price else 0.0 for weight in weights]
        assert row == pytest.approx(wanted, abs=1e-3)
        assert all(gate == 0 for gate, at in zip(row, wanted, strict=True) if at == 0)


def test_the_steps_are_those_of_adam() -> None:
    """Against the update written out (arXiv 1412.6980), with the state of every step."""
    worth = [3.0, 0.2, 0.7]
    states: list[GateState] = []
    oracle = squares([[weight] for weight in worth])
    learn_gates(oracle, (3, 1), GateSettings(25, 0.03, 1), 0.6, states.append)
    gates, first, second = [1.0] * 3, [0.0] * 3, [0.0] * 3
    for step, state in enumerate(states, start=1):
        for i, weight in enumerate(worth):
            slope = -weight * (1 - gates[i]) + 0.6 / 3
            first[i] = 0.9 * first[i] + 0.1 * slope
            second[i] = 0.999 * second[i] + 0.001 * slope**2
            down = first[i] / (1 - 0.9**step)
            size = math.sqrt(second[i] / (1 - 0.999**step)) + 1e-8
            gates[i] = min(1.0, max(0.0, gates[i] - 0.03 * down / size))
        assert state.step == step
        assert [row[0] for row in state.parameters] == pytest.approx(gates, abs=1e-12)


@pytest.mark.parametrize("budget", [1, 2, 4])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_budget_goes_to_what_is_worth_most(budget: int, noise: float) -> None:
    worth = [[0.1, 2.0], [0.3, 0.0], [1.5, 0.9], [0.05, 0.2]]
    states: list[GateState] = []
    chances = learn_budgeted_gates(
        sums(worth, noise), (4, 2), GateSettings(400, 0.05, 1), budget, 0.05, states.append
    )
    flat = [chance for row in chances for chance in row]
    assert best(flat, budget) == best([w for row in worth for w in row], budget)
    assert sum(flat) == pytest.approx(budget, abs=0.5)
    assert len(states) == 400


def test_layers_that_work_together_are_found() -> None:
    """Each alone does nothing, so that the slopes at the sliding end praise another layer."""

    def loss(gates: torch.Tensor) -> torch.Tensor:
        a = gates[:, 0]
        return 1 - a[1] * a[4] + 0.3 * (1 - a[2])

    def of_set(kept: Sequence[int]) -> float:
        return float(loss(torch.tensor([[float(i in kept)] for i in range(6)])))

    optimum = set(min(itertools.combinations(range(6), 2), key=of_set))
    slopes = layer_values(Loss(loss)(0, ((0.0,),) * 6).by_gate)
    assert optimum == {1, 4}
    assert best([-slope for slope in slopes], 1) == {2}
    settings = GateSettings(400, 0.05, 1)
    budgeted = learn_budgeted_gates(Loss(loss), (6, 1), settings, 2, 0.05, forget)
    assert best(layer_values(budgeted), 2) == optimum
    sparse = learn_gates(Loss(loss), (6, 1), GateSettings(300, 0.02, 1), 2.4, forget)
    assert best(layer_values(sparse), 2) == optimum


def test_drawn_gates_are_hard_concrete() -> None:
    """How often they are 0 and 1, by the distribution's closed form (arXiv 1712.01312)."""
    oracle = sums([[0.0]] * 40)
    chances = learn_budgeted_gates(oracle, (40, 1), GateSettings(400, 0.0, 1), 20, 0.0, forget)
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
    settings = GateSettings(400, 0.0, 1, seed=1)
    learn_budgeted_gates(other, (40, 1), settings, 20, 0.0, forget)
    assert other.asked != oracle.asked


@pytest.mark.parametrize("stop", [1, 13, 29])
@pytest.mark.parametrize("budgeted", [False, True])
def test_a_run_goes_on_as_if_it_had_not_stopped(budgeted: bool, stop: int) -> None:
    """From a state that has been through a file, to the last bit."""
    settings = GateSettings(30, 0.05, 1, seed=3)
    worth = [[0.1, 2.0], [0.3, 0.0], [1.5, 0.9]]

    def run(start: GateState | None) -> tuple[Gates, list[GateState], Loss]:
        oracle, states = sums(worth, noise=0.3), list[GateState]()
        if budgeted:
            gates = learn_budgeted_gates(
                oracle, (3, 2), settings, 2, 0.05, states.append, start=start
            )
        else:
            gates = learn_gates(oracle, (3, 2), settings, 1.0, states.append, start=start)
        return gates, states, oracle

    whole, states, asked = run(None)
    cut_off = GateState.from_json(json.loads(json.dumps(states[stop - 1].to_json())))
    assert cut_off == states[stop - 1]
    gates, later, asked_later = run(cut_off)
    assert gates == whole
    assert later == states[stop:]
    assert asked_later.asked == asked.asked[stop:]
    # Nothing is left to do after the last step.
    assert run(states[-1])[:2] == (whole, [])


class FakeMeter:
    """Derivatives that name their example; it remembers what it was asked."""

    def __init__(self) -> None:
        self.groups: list[list[Example]] = []
        self.targets: list[Example] = []

    def gate_gradients(
        self,
        examples: Sequence[Example],
        weights: Gates,
        advance: Callable[[float], None],
        targets: Sequence[torch.Tensor] | None = None,
    ) -> list[GateGradients]:
        """As `Meter.gate_gradients`."""
        advance(1)
        self.groups.append(list(examples))
        if targets is not None:
            assert [int(target) for target in targets] == [e.prompt[0] for e in examples]
        sign = 1 if targets is None else -1
        return [
            GateGradients(
                sign * e.prompt[0],
                tuple(tuple(w * e.prompt[0] for w in row) for row in weights),
            )
            for e in examples
        ]

    def full_states(
        self, examples: Sequence[Example], advance: Callable[[float], None]
    ) -> list[torch.Tensor]:
        """As `Meter.full_states`."""
        advance(1)
        self.targets += examples
        return [torch.tensor(e.prompt[0]) for e in examples]


@pytest.mark.parametrize("hidden", [False, True])
def test_a_step_is_the_mean_over_its_own_examples(hidden: bool) -> None:
    examples = [Example((i, 0), (1,), "some") for i in range(10)]
    gates = ((1.0, 2.0), (0.0, -1.0))

    def oracle(meter: FakeMeter, seed: int = 0, batch: int = 4) -> ExamplesOracle:
        options = {"batch": batch, "group": 3, "seed": seed, "hidden": hidden, "advance": ignore}
        return ExamplesOracle(meter, examples, **options)  # type: ignore[arg-type]

    meter = FakeMeter()
    steps = oracle(meter)
    draws = []
    for step in range(30):
        meter.groups.clear()
        found = steps(step, gates)
        assert [len(group) for group in meter.groups] == [3, 1]
        drawn = [e.prompt[0] for group in meter.groups for e in group]
        assert len(set(drawn)) == 4
        mean = sum(drawn) / 4
        assert found.loss == pytest.approx(-mean if hidden else mean)
        assert found.by_gate == ((mean, 2 * mean), (0.0, -mean))
        draws.append(drawn)
    assert {place for drawn in draws for place in drawn} == set(range(10))
    assert len({tuple(drawn) for drawn in draws}) > 20
    # What the full model says of an example is asked once.
    assert len(meter.targets) == (10 if hidden else 0)
    # A step is the same in another run, whatever came before it, and another under another seed.
    again, other = FakeMeter(), FakeMeter()
    assert oracle(again)(17, gates) == steps(17, gates)
    oracle(other, seed=1)(17, gates)
    assert other.groups != again.groups
    everything = FakeMeter()
    oracle(everything, batch=50)(0, gates)
    assert sorted(e.prompt[0] for g in everything.groups for e in g) == list(range(10))


@pytest.mark.usefixtures("one_thread")
def test_the_layers_that_carry_recall_are_found(tmp_path: Path) -> None:
    """In the bundled model these are 2 and 5 (`benchmarks/demo-model.md`), here in few steps."""
    if not DEMO.exists():
        pytest.skip("the demonstration model is not in this checkout")
    settings = Settings(window=16, samples=16, holdout=0, length=128)
    work = Work(tmp_path, False, silent, lambda _: None, lambda _: None)
    measured = measurement_of(open_source(str(DEMO)), settings, work)
    meter, group = measured.meter(gradient=True)
    states: list[GateState] = []

    def run(shape: tuple[int, int], steps: int, start: GateState | None = None) -> Gates:
        options = {"batch": 4, "group": group, "seed": 0, "hidden": True, "advance": ignore}
        oracle = ExamplesOracle(meter, measured.examples.scored, **options)  # type: ignore[arg-type]
        return learn_gates(oracle, shape, GateSettings(steps, 0.05, 4), 1.0, states.append, start)

    assert best(layer_values(run((8, 1), 14)), 2) == {2, 5}
    states.clear()
    by_head = run((8, 2), 4)
    assert [len(row) for row in by_head] == [2] * 8
    # Not what a weight shared by a layer's heads would come to.
    assert any(row[0] != row[1] for row in by_head)
    assert run((8, 2), 4, states[2]) == by_head
