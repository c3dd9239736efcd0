"""Gates: on losses whose best gates are known, and as a selector of a model's layers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from converter.calibration.calibrate import CalibrationTask, calibrate
from converter.calibration.data.examples import digest_of
from converter.calibration.evaluator import PlanEvaluator, open_evaluator
from converter.calibration.scores_file import load_scores
from converter.calibration.selectors import SELECTORS
from converter.calibration.selectors.gates import (
    GATES,
    GateSettings,
    HiddenStateGradients,
    learn_gates,
)
from converter.inference.gate_gradients import GateGradients, Gates
from converter.inference.positions import token_spans
from converter.model.source import open_source
from converter.pipeline import RunContext, calibration_run
from converter.plan.units import Units
from converter.settings import Settings
from tests.conftest import DEMO, LAYERS, SIZES, run_cli
from tests.held import records_of, write_rows
from tests.runners import MASKS, example_of, ignore, resident, run, scoring, silent, watched

Table = Sequence[Sequence[float]]

EXAMPLES = [example_of(30 + 3 * i, 2, seed=i) for i in range(10)]
MASK = MASKS["plain"]
HEADS = SIZES["num_key_value_heads"]
# Steps that learn little, where it does not matter what is learned.
QUICK = replace(GATES, settings=replace(GATES.settings, steps=16))

pytestmark = pytest.mark.usefixtures("one_thread")


# --- learning ---------------------------------------------------------------------------------


def best_of(values: Sequence[float], count: int) -> set[int]:
    return set(sorted(range(len(values)), key=lambda i: -values[i])[:count])


class Loss:
    """A loss written down in torch; it remembers what it was asked."""

    def __init__(self, loss: Callable[[torch.Tensor], torch.Tensor], noise: float = 0.0) -> None:
        self._loss = loss
        self._noise = noise
        self.asked: list[tuple[int, Gates]] = []

    def __call__(self, step: int, gates: Gates) -> GateGradients:
        """As `GradientsAt`; a step always has the same noise."""
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


@pytest.mark.parametrize(
    "worth", [((4.0,), (0.5,), (1.0,), (0.05,), (0.0,)), ((2.0, 0.1), (0.0, 0.6), (0.3, 0.2))]
)
def test_gates_settle_where_the_loss_pays_for_them(worth: Table) -> None:
    """Loss and penalty have slopes that cancel at 1 - sparsity / (gates * worth), or at 0."""
    sparsity = 1.5
    shape = len(worth), len(worth[0])
    oracle = squares(worth)
    learn_gates(oracle, shape, GateSettings(600, 0.02, 1), sparsity)
    for row, weights in zip(oracle.asked[-1][1], worth, strict=True):
        price = sparsity / math.prod(shape)
        wanted = [1 - price / weight if weight > price else 0.0 for weight in weights]
        assert row == pytest.approx(wanted, abs=1e-3)
        assert all(gate == 0 for gate, at in zip(row, wanted, strict=True) if at == 0)


def test_the_steps_are_those_of_adam_and_the_result_is_their_mean() -> None:
    """Against the update written out (arXiv 1412.6980), step by step."""
    worth, steps = [3.0, 0.2, 0.7], 25
    oracle = squares([[weight] for weight in worth])
    found = learn_gates(oracle, (3, 1), GateSettings(steps, 0.03, 1), 0.6)
    gates, first, second, passed = [1.0] * 3, [0.0] * 3, [0.0] * 3, [0.0] * 3
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
            passed[i] += gates[i]
    assert [row[0] for row in found] == pytest.approx([s / steps for s in passed], abs=1e-12)


def test_of_gates_that_end_closed_the_one_held_open_longer_comes_first() -> None:
    asked: list[Gates] = []

    def gradients_at(step: int, gates: Gates) -> GateGradients:
        """Nobody needs the first; the second for some steps, the third for more."""
        asked.append(gates)
        return GateGradients(0.0, ((0.0,), (-1.0 * (step < 20),), (-1.0 * (step < 60),)))

    first, second, third = learn_gates(gradients_at, (3, 1), GateSettings(300, 0.05, 1), 0.6)
    assert asked[-1] == ((0.0,),) * 3
    assert third[0] > second[0] > first[0] > 0


def test_layers_that_work_together_are_found() -> None:
    # Layers 1 and 4 do nothing alone, so that the slopes at the sliding end praise layer 2.
    pair = Loss(lambda gates: (1 - gates[1] * gates[4] + 0.3 * (1 - gates[2]))[0])
    slopes = [slope for (slope,) in pair(0, ((0.0,),) * 6).by_gate]
    assert best_of([-slope for slope in slopes], 1) == {2}
    gates = learn_gates(pair, (6, 1), GateSettings(300, 0.02, 1), 2.4)
    assert best_of([gate for (gate,) in gates], 2) == {1, 4}


# --- the gradients of a model -----------------------------------------------------------------


@contextmanager
def evaluator_of(source: Path, work: Path) -> Iterator[PlanEvaluator]:
    calibration = run(source, EXAMPLES, MASK, work)
    with (
        open_evaluator(calibration, EXAMPLES, "scores") as evaluator,
        evaluator.tallying("", 0, silent),
    ):
        yield evaluator


def test_a_step_is_the_mean_over_the_examples_it_draws(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    """The draw is read from the log, the mean made of one example after another."""
    at: Gates = ((0.5, 1.0), (0.0, 0.0), (0.25, 0.0), (1.0, 0.75))
    runner, draws = resident(sources["qwen3"], MASK), list[tuple[int, ...]]()

    def drawn(settings: GateSettings, step: int, at: Gates) -> tuple[int, ...]:
        # A folder of its own for every step, so that nothing is known.
        work = tmp_path / f"{len(draws)}"
        with evaluator_of(sources["qwen3"], work) as evaluator:
            found = HiddenStateGradients(evaluator, settings)(step, at)
        records = records_of(work / "scores.jsonl")
        places = {digest_of(example): index for index, example in enumerate(EXAMPLES)}
        indices = tuple(places[record["name"].split()[1]] for record in records)
        alone = []
        for index in indices:
            example = [EXAMPLES[index]]
            targets = runner.full_states(example, ignore)
            alone += runner.gate_gradients(example, at, ignore, targets)
        assert found.loss == pytest.approx(sum(one.loss for one in alone) / len(indices))
        for layer, row in enumerate(found.by_gate):
            for gate, slope in enumerate(row):
                mean = sum(one.by_gate[layer][gate] for one in alone) / len(indices)
                assert slope == pytest.approx(mean, rel=1e-9, abs=1e-12)
        draws.append(indices)
        return indices

    few = GateSettings(20, 0.1, passes=6)
    by_step = [drawn(few, step, at) for step in range(12)]
    # 10 examples, each 6 times, in 20 steps.
    assert {len(set(indices)) for indices in by_step} == {3}
    assert {index for indices in by_step for index in indices} == set(range(10))
    assert len(set(by_step)) > 8
    # By the step alone.
    assert drawn(few, 7, ((0.5,),) * LAYERS) == by_step[7]
    # A step reads one example at least, and at most all.
    assert len(GateSettings(500, 0.1, 6).drawn(0, 10)) == 1
    assert sorted(GateSettings(4, 0.1, 4).drawn(0, 10)) == list(range(10))


def test_closed_gates_cost_what_sliding_does_to_hidden_states(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    with evaluator_of(sources["qwen3"], tmp_path) as evaluator:
        found = HiddenStateGradients(evaluator, GATES.settings).all_sliding(2)
    runner = resident(sources["qwen3"], MASK)
    targets = runner.full_states(EXAMPLES, ignore)
    alone = runner.gate_gradients(EXAMPLES, ((0.0,),) * LAYERS, ignore, targets)
    assert found == pytest.approx(sum(one.loss for one in alone) / len(EXAMPLES))


# --- as a selector ----------------------------------------------------------------------------


def test_a_command_line_chooses_by_gates_and_shows_heads(
    sources: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(SELECTORS, "gates", QUICK)
    rows, out = write_rows(tmp_path / "rows.jsonl", 6, 60, seed=0), tmp_path / "scores.json"
    options = ("--method", "gates", "--data", rows, "--samples", 6, "--window", 12)
    assert run_cli("calibrate", sources["qwen3"], "--out", out, *options, "--budget", 2) == 0
    printed = capsys.readouterr().out
    scores = load_scores(out)
    assert sorted(scores.order) == list(range(LAYERS))
    heads = json.loads(out.read_text())["heads"]
    assert [len(row) for row in heads] == [HEADS] * LAYERS
    assert all(0 <= gate <= 1 for row in heads for gate in row)
    # Not what a gate shared by a layer's heads would come to.
    assert any(row[0] != row[1] for row in heads)
    assert scores.heads == tuple(map(tuple, heads))
    means = [sum(row) / HEADS for row in heads]
    assert list(scores.order[:2]) == sorted(range(LAYERS), key=lambda i: -means[i])[:2]
    plan = ("plan", sources["qwen3"], "--scores", out, "--budget", 2)
    assert run_cli(*plan) == 0
    for text in (printed, capsys.readouterr().out):
        table = text[text.index("gate of each KV head") :]
        for layer, row in enumerate(heads):
            shown = r"\s+".join(f"{gate:.2f}" for gate in row)
            assert re.search(rf"^\s*{layer}\s+{shown}\s*$", table, re.MULTILINE)


def test_the_cost_is_what_was_run_and_no_more_than_was_said(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    bars, progress = watched()
    # All of one length: which are read how often is drawn.
    examples = [example_of(40, 2, seed=i) for i in range(8)]
    calibration = run(sources["qwen3"], examples, MASK, tmp_path)
    scores = calibrate(calibration, CalibrationTask((QUICK,), 2), progress).scores
    (bar,) = bars
    assert bar.done == pytest.approx(scores.layer_forwards)
    assert bar.done == bar.expected
    spans = [token_spans(example, MASK) for example in examples]
    foretold = sum(QUICK.cost(one, MASK, Units(LAYERS), 2) for one in spans)
    assert 0.3 * foretold < scores.layer_forwards <= foretold
    compared = SELECTORS["path-integral"].cost(spans[0], MASK, Units(LAYERS), 2)
    assert GATES.cost(spans[0], MASK, Units(LAYERS), 2) < 2 * compared


def test_the_layers_that_carry_recall_are_found(tmp_path: Path) -> None:
    """In the bundled model these are 2 and 5 (`benchmarks/demo-model.md`)."""
    if not DEMO.exists():
        pytest.skip("the demonstration model is not in this checkout")
    settings = Settings(window=16, samples=8, holdout=0, length=128)
    where = RunContext(tmp_path, False, silent, lambda _: None, lambda _: None)
    calibration = calibration_run(open_source(str(DEMO)), settings, where, comparing=False)
    order = calibrate(calibration, scoring("gates", keep=2), silent).scores.order
    assert set(order[:2]) == {2, 5}
