"""Gates as selectors: whose gradients they follow, what they cost, and runs that are cut short."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from converter.calibration.calibrate import calibrate
from converter.calibration.evaluator import PlanEvaluator, open_evaluator
from converter.calibration.gates.settings import GateSettings
from converter.calibration.log import ResultLog
from converter.calibration.scores import load_scores
from converter.calibration.selectors import SELECTORS, gates
from converter.calibration.selectors.gates import EvaluatorGradients
from converter.inference.gate_gradients import Gates
from converter.inference.positions import token_spans
from converter.model.source import open_source
from converter.pipeline import RunContext, calibration_run
from converter.settings import Settings
from tests.conftest import DEMO, LAYERS, SIZES, run_cli
from tests.runners import (
    MASKS,
    Counter,
    example_of,
    ignore,
    measurement,
    nlls,
    resident,
    scoring,
    silent,
)

GATES = ("gates", "gates-budget", "gates-heads")
EXAMPLES = [example_of(30 + 3 * i, 2, seed=i) for i in range(10)]
MASK = MASKS["plain"]
HEADS = SIZES["num_key_value_heads"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that learn little, where it does not matter what is learned."""
    monkeypatch.setattr(gates, "_SPARSE", GateSettings(16, 0.05))
    monkeypatch.setattr(gates, "_BUDGETED", GateSettings(40, 0.06))


def journal_names(work: Path) -> list[str]:
    """The names of all records, in order."""
    lines = (work / "scores.jsonl").read_text().splitlines()
    return [json.loads(line)["name"] for line in lines[1:]]


@contextmanager
def evaluator_of(source: Path, work: Path) -> Iterator[PlanEvaluator]:
    measured = measurement(source, EXAMPLES, MASK, work)
    with (
        open_evaluator(measured, EXAMPLES, "scores") as evaluator,
        evaluator.tallying("", 0, silent),
    ):
        yield evaluator


@pytest.mark.parametrize("hidden", [False, True])
def test_a_step_is_the_mean_over_the_examples_it_draws(
    hidden: bool, sources: dict[str, Path], tmp_path: Path
) -> None:
    """The draw is read from the journal, the mean made of one example after another."""
    at: Gates = ((0.5, 1.0), (0.0, 0.0), (0.25, 0.0), (1.0, 0.75))
    runner, draws = resident(sources["qwen3"], MASK), list[tuple[int, ...]]()

    def drawn(settings: GateSettings, passes: int, step: int, at: Gates) -> tuple[int, ...]:
        # A folder of its own for every step, so that nothing is known.
        work = tmp_path / f"{len(draws)}"
        with evaluator_of(sources["qwen3"], work) as evaluator:
            found = EvaluatorGradients(evaluator, settings, passes, hidden=hidden)(step, at)
        places = tuple(int(name.split()[1]) for name in journal_names(work))
        alone = []
        for place in places:
            example = [EXAMPLES[place]]
            targets = runner.full_states(example, ignore) if hidden else None
            alone += runner.gate_gradients(example, at, ignore, targets)
        assert found.loss == pytest.approx(sum(one.loss for one in alone) / len(places))
        for layer, row in enumerate(found.by_gate):
            for gate, slope in enumerate(row):
                mean = sum(one.by_gate[layer][gate] for one in alone) / len(places)
                assert slope == pytest.approx(mean, rel=1e-9, abs=1e-12)
        draws.append(places)
        return places

    few = GateSettings(steps=20, learning_rate=0.1)
    by_step = [drawn(few, 6, step, at) for step in range(12)]
    # 10 examples, each 6 times, in 20 steps.
    assert {len(set(places)) for places in by_step} == {3}
    assert {place for places in by_step for place in places} == set(range(10))
    assert len(set(by_step)) > 8
    # By the step and the seed alone.
    assert drawn(few, 6, 7, ((0.5,),) * LAYERS) == by_step[7]
    assert drawn(GateSettings(20, 0.1, seed=1), 6, 7, at) != by_step[7]
    # A step reads one example at least, and at most all.
    assert len(drawn(GateSettings(500, 0.1), 6, 0, at)) == 1
    assert sorted(drawn(GateSettings(4, 0.1), 4, 0, at)) == list(range(10))


def test_closed_gates_cost_what_sliding_does(sources: dict[str, Path], tmp_path: Path) -> None:
    """By the NLL, which is measured otherwise; and a loss of hidden states is no NLL."""
    settings = GateSettings(20, 0.1)
    with evaluator_of(sources["qwen3"], tmp_path) as evaluator:
        answer = EvaluatorGradients(evaluator, settings, 4, hidden=False).all_sliding(2)
        hidden = EvaluatorGradients(evaluator, settings, 4, hidden=True).all_sliding(1)
    losses = nlls(resident(sources["qwen3"], MASK), EXAMPLES, [("sliding_attention",) * LAYERS])
    assert answer == pytest.approx(sum(loss for (loss,) in losses) / len(EXAMPLES))
    assert abs(hidden - answer) > 0.1


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = [
        {"prompt": f"{'some words '}{'and more ' * (4 + row % 5)}end.", "answer": f"yes {row}"}
        for row in range(6)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("method", GATES)
def test_a_command_line_chooses_by_gates_and_shows_heads(
    method: str,
    sources: dict[str, Path],
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "scores.json"
    options = ("--method", method, "--data", rows, "--samples", 6, "--window", 12)
    assert run_cli("calibrate", sources["qwen3"], "--out", out, *options, "--budget", 2) == 0
    printed = capsys.readouterr().out
    scores = load_scores(out)
    assert scores.method == method
    assert sorted(scores.order) == list(range(LAYERS))
    heads = json.loads(out.read_text())["heads"]
    if method != "gates-heads":
        assert heads is scores.heads is None
        assert "KV head" not in printed
        return
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


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("method", GATES)
@pytest.mark.parametrize("stop", [4, 23])
def test_a_run_cut_short_goes_on_to_the_same_bits(
    method: str,
    stop: int,
    sources: dict[str, Path],
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(name: str) -> int:
        out, work = tmp_path / f"{name}.json", tmp_path / name
        options = ("--method", method, "--data", rows, "--samples", 6, "--window", 12, "-q")
        return run_cli("calibrate", sources["qwen3"], "--out", out, "--work", work, *options)

    assert run("whole") == 0
    append, kept = ResultLog.append, list[object]()

    class Killed(Exception):  # noqa: N818 - it stands in for a signal
        pass

    def failing(log: ResultLog, record: Mapping[str, Any]) -> None:
        # The first is the journal's head.
        if len(kept) > stop:
            raise Killed
        kept.append(record)
        append(log, record)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ResultLog, "append", failing)
        run("cut")
    found = (tmp_path / "cut" / "scores.jsonl").read_bytes()
    assert found.count(b"\n") == stop + 1
    assert run("cut") == 0
    assert (tmp_path / "cut.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert (tmp_path / "cut" / "scores.jsonl").read_bytes().startswith(found)
    assert journal_names(tmp_path / "cut") == journal_names(tmp_path / "whole")


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("method", GATES)
def test_the_account_is_what_was_run_and_no_more_than_was_said(
    method: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    bars: list[Counter] = []

    @contextmanager
    def progress(_title: str, layer_forwards: float) -> Iterator[Counter]:
        bars.append(Counter(expected=layer_forwards))
        yield bars[-1]

    # All of one length: which are read how often is drawn.
    examples = [example_of(40, 2, seed=i) for i in range(8)]
    measured = measurement(sources["qwen3"], examples, MASK, tmp_path)
    scores = calibrate(measured, scoring(method, keep=2), progress).scores
    (bar,) = bars
    assert bar.done == pytest.approx(scores.layer_forwards)
    assert bar.done == bar.expected
    foretold = sum(
        SELECTORS[method].cost(token_spans(example, MASK), MASK, LAYERS, 2) for example in examples
    )
    assert 0.3 * foretold < scores.layer_forwards <= foretold
    compared = SELECTORS["path-integral"].cost(token_spans(examples[0], MASK), MASK, LAYERS, 2)
    assert SELECTORS[method].cost(token_spans(examples[0], MASK), MASK, LAYERS, 2) < 2 * compared


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("method", GATES)
@pytest.mark.parametrize("keep", [0, LAYERS])
def test_no_layer_and_all_layers_are_kept_in_some_order(
    method: str, keep: int, sources: dict[str, Path], tmp_path: Path
) -> None:
    measured = measurement(sources["llama"], EXAMPLES[:2], MASK, tmp_path)
    scores = calibrate(measured, scoring(method, keep=keep), silent).scores
    assert sorted(scores.order) == list(range(LAYERS))


def kept_by(method: str, keep: int, work: Path) -> Sequence[int]:
    settings = Settings(window=16, samples=8, holdout=0, length=128)
    where = RunContext(work, False, silent, lambda _: None, lambda _: None)
    measured = calibration_run(open_source(str(DEMO)), settings, where, comparing=False)
    return calibrate(measured, scoring(method, keep=keep), silent).scores.order[:keep]


@pytest.mark.parametrize("method", GATES[:2])
def test_the_layers_that_carry_recall_are_found(method: str, tmp_path: Path) -> None:
    """In the bundled model these are 2 and 5 (`benchmarks/demo-model.md`)."""
    if not DEMO.exists():
        pytest.skip("the demonstration model is not in this checkout")
    assert set(kept_by(method, 2, tmp_path)) == {2, 5}
