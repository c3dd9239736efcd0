"""The evaluator: true losses of any sets of layers, and scores, each found once and kept."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from converter.calibration.cache import ResultLog
from converter.calibration.calibrate import CalibrationTask, calibrate
from converter.calibration.evaluator import FullUnits, PlanEvaluator, open_evaluator
from converter.calibration.run import CalibrationRun
from converter.calibration.selectors import SELECTORS, scorer_of
from converter.calibration.selectors.gates import GATES
from converter.calibration.selectors.guided import GUIDED
from converter.common.errors import DataError, ScoresError
from converter.inference.example import Example
from converter.inference.runner import ModelRunner
from converter.model.mask import Mask
from converter.plan.plan import layer_types_of
from converter.plan.units import Units
from tests.conftest import LAYERS
from tests.held import records_of
from tests.runners import MASKS, Counter, Plain, example_of, run, scoring, silent

pytestmark = pytest.mark.usefixtures("exactly")

# Two kinds, of different lengths; one of each is not the same number of examples.
EXAMPLES = tuple(
    replace(example_of(prompt, answer, seed=9), kind=kind)
    for prompt, answer, kind in (
        (70, 2, "near"),
        (61, 5, "far"),
        (90, 1, "near"),
        (48, 3, "near"),
        (33, 2, "far"),
    )
)
EVERY_SET = [frozenset(s) for n in range(LAYERS + 1) for s in combinations(range(LAYERS), n)]


def near(value: Any) -> Any:
    return pytest.approx(value, rel=0, abs=1e-9)


@pytest.fixture
def measured(sources: dict[str, Path], tmp_path: Path) -> CalibrationRun:
    return run(sources["qwen3"], EXAMPLES, MASKS["plain"], tmp_path / "work")


@contextmanager
def evaluating(measured: CalibrationRun) -> Iterator[PlanEvaluator]:
    with (
        open_evaluator(measured, measured.examples.scored, "scores") as evaluator,
        evaluator.tallying("test", 0, silent),
    ):
        yield evaluator


class Asked(list[tuple[FullUnits, Example]]):
    """What the model was run on: pairs of a set of full layers and an example."""

    def take(self) -> list[tuple[FullUnits, Example]]:
        """Everything since the last time."""
        taken = self[:]
        self.clear()
        return taken


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    kept, answers = Asked(), ModelRunner.answers

    def watched(self: ModelRunner, examples: Any, plans: Any, advance: Any) -> Any:
        for plan in plans:
            full = frozenset(i for i, kind in enumerate(plan) if kind == "full_attention")
            kept.extend((full, example) for example in examples)
        return answers(self, examples, plans, advance)

    monkeypatch.setattr(ModelRunner, "answers", watched)
    return kept


def brute_force(source: Path, mask: Mask) -> dict[FullUnits, list[float]]:
    """Every set's loss on every example, one pass each over the whole model."""
    plain, plans = Plain(source, mask), {s: layer_types_of(s, LAYERS) for s in EVERY_SET}
    return {s: [plain.nll(example, plan) for example in EXAMPLES] for s, plan in plans.items()}


@pytest.fixture(scope="module")
def truth(sources: dict[str, Path], exactly: None) -> dict[FullUnits, list[float]]:  # noqa: ARG001
    return brute_force(sources["qwen3"], MASKS["plain"])


# --- true losses ------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [MASKS["plain"], MASKS["sinks and full decode"]], ids=str)
def test_losses_of_all_sets_are_those_of_the_whole_model(
    mask: Mask, sources: dict[str, Path], tmp_path: Path
) -> None:
    truth = brute_force(sources["qwen3"], mask)
    measured = run(sources["qwen3"], EXAMPLES, mask, tmp_path / "work")
    # In any order, and of one set twice.
    sets = random.Random(1).sample(EVERY_SET, len(EVERY_SET))  # noqa: S311 - reproducible
    sets.append(sets[3])
    with evaluating(measured) as evaluator:
        assert evaluator.losses(sets) == near([fmean(truth[s]) for s in sets])
        for answers, layers in zip(evaluator.answers(sets), sets, strict=True):
            assert [a.nll for a in answers] == near(truth[layers])


def test_answers_to_some_examples_are_of_those_alone(
    measured: CalibrationRun, truth: dict[FullUnits, list[float]], asked: Asked
) -> None:
    sets = [frozenset({1}), frozenset({0, 3})]
    with evaluating(measured) as evaluator:
        for begin, end in ((0, 1), (0, 3), (2, 4), (0, 5)):
            asked.take()
            for layers, answers in zip(sets, evaluator.answers(sets, begin, end), strict=True):
                assert [a.nll for a in answers] == near(truth[layers][begin:end])
            assert {example for _, example in asked.take()} <= set(EXAMPLES[begin:end])


def test_scores_by_one_switch_are_differences_of_true_losses(
    measured: CalibrationRun, truth: dict[FullUnits, list[float]]
) -> None:
    none, full = frozenset[int](), frozenset(range(LAYERS))
    with evaluating(measured) as evaluator:
        restored = scorer_of("nll-restore").scores(evaluator, range(LAYERS))
        removed = scorer_of("nll-remove").scores(evaluator, (2, 0), 1, 4)
    for place, scores in enumerate(restored):
        assert scores.sliding == near(truth[none][place])
        assert scores.full is None
        gains = [truth[none][place] - truth[none | {i}][place] for i in range(LAYERS)]
        assert scores.scores == near(gains)
    assert len(removed) == 3
    for place, scores in enumerate(removed, start=1):
        assert scores.full == near(truth[full][place])
        assert (scores.scores[1], scores.scores[3]) == (None, None)
        for layer in (0, 2):
            lost = truth[full - {layer}][place] - truth[full][place]
            assert scores.scores[layer] == near(lost)


@pytest.mark.parametrize("method", ["kl", "path-integral"])
def test_scores_that_are_no_losses_are_the_runners_own_and_found_once(
    method: str, measured: CalibrationRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = scorer_of(method)
    runner, _ = measured.runner(scorer.needs_gradients)
    truth = scorer.measure(runner, EXAMPLES, range(LAYERS), lambda _: None, Units(LAYERS))
    with evaluating(measured) as evaluator:
        for view, examples in ((evaluator.only("far"), EXAMPLES[1::3]), (evaluator, EXAMPLES)):
            found = scorer.scores(view, range(LAYERS))
            expected = [truth[EXAMPLES.index(example)] for example in examples]
            for mine, theirs in zip(found, expected, strict=True):
                assert mine.scores == near(theirs.scores)
                assert mine.kind == theirs.kind
        monkeypatch.setattr(CalibrationRun, "runner", None)
        assert scorer.scores(evaluator, range(LAYERS), 2, 4) == found[2:4]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_result_that_is_no_number_is_refused_and_not_kept(
    value: float, measured: CalibrationRun
) -> None:
    with evaluating(measured) as evaluator:
        for record in ({"loss": value}, {"scores": {"of": [[1.0, None], [True, value]]}}):
            with pytest.raises(DataError, match="not a finite number") as caught:
                evaluator.records("made up", lambda *_, r=record: [r], lambda _: 1.0, [0])
            assert "the weights are damaged" in caught.value.details["next step"]
    with evaluating(measured) as evaluator:
        assert evaluator.cache.found_earlier == 0


# --- each thing once --------------------------------------------------------------------------


def test_a_set_is_run_once_on_each_example_whoever_asks(
    measured: CalibrationRun, asked: Asked
) -> None:
    one, two, three = frozenset({0}), frozenset({0, 1}), frozenset({3})
    with evaluating(measured) as evaluator:
        evaluator.answers([one, two], end=2)
        evaluator.losses([two, one, two])
        evaluator.only("far").losses([three])
        scorer_of("nll-restore").scores(evaluator, range(LAYERS))
        evaluator.losses([three, one])
        with evaluator.tallying("another", 0, silent):
            evaluator.losses([one, two, three])
    pairs = asked.take()
    assert len(set(pairs)) == len(pairs)
    # The sets above, and those of restore-one.
    sets = {one, two, three, frozenset[int]()}
    sets |= {frozenset({i}) for i in range(LAYERS)}
    assert set(pairs) == {(layers, example) for layers in sets for example in EXAMPLES}


def test_a_later_evaluator_runs_nothing_again(measured: CalibrationRun, asked: Asked) -> None:
    sets = EVERY_SET[::2]
    with evaluating(measured) as evaluator:
        found = evaluator.losses(sets)
        assert evaluator.cache.found_earlier == 0
    assert asked.take()
    with evaluating(measured) as evaluator:
        assert evaluator.cache.found_earlier > 0
        assert evaluator.losses(sets) == found
    assert asked.take() == []
    with (
        open_evaluator(measured, tuple(reversed(EXAMPLES)), "scores") as evaluator,
        evaluator.tallying("reversed", 0, silent),
    ):
        assert evaluator.losses(sets) == near(found)
    assert asked.take() == []
    with pytest.raises(ScoresError, match="seed was unknown, now 1"):
        evaluating(replace(measured, drawn_by={"seed": 1})).__enter__()
    with evaluating(replace(measured, fresh=True)) as evaluator:
        assert evaluator.cache.found_earlier == 0
        assert evaluator.losses(sets) == found
    assert asked.take()


def test_a_view_of_one_kind_knows_what_the_whole_knows(
    measured: CalibrationRun, truth: dict[FullUnits, list[float]], asked: Asked
) -> None:
    with evaluating(measured) as evaluator:
        evaluator.losses(EVERY_SET[:8])
        asked.take()
        for kind in ("near", "far"):
            view = evaluator.only(kind)
            mine = [i for i, example in enumerate(EXAMPLES) if example.kind == kind]
            assert view.examples == tuple(EXAMPLES[i] for i in mine)
            assert view.losses(EVERY_SET[:8]) == near(
                [fmean(truth[s][i] for i in mine) for s in EVERY_SET[:8]]
            )
            scores = scorer_of("nll-restore").scores(view, range(3), 1, 2)
            assert [s.prompt_tokens for s in scores] == [len(EXAMPLES[mine[1]].prompt)]
            assert asked.take() == []
        # And the other way round: the whole runs a view's set on the other kind only.
        evaluator.only("far").answers(EVERY_SET[9:10], end=1)
        assert [example for _, example in asked.take()] == [EXAMPLES[1]]
        evaluator.losses(EVERY_SET[9:10])
        assert {example for _, example in asked.take()} == set(EXAMPLES) - {EXAMPLES[1]}


def test_what_is_charged_is_what_it_would_have_cost_alone(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    """Held against the layer-forwards that an evaluator of one's own really runs."""
    methods = ("nll-restore", "nll-remove", "guided", "kl", "search")

    def choose(evaluator: PlanEvaluator, name: str) -> tuple[float, float]:
        """Layer-forwards charged, and run."""
        bar = Counter()

        @contextmanager
        def progress(_title: str, _amount: float) -> Iterator[Counter]:
            yield bar

        with evaluator.tallying(name, 0, progress) as tally:
            SELECTORS[name].choose(evaluator, 2)
        return tally.layer_forwards, bar.done

    shared = run(sources["qwen3"], EXAMPLES, MASKS["plain"], tmp_path / "shared")
    with open_evaluator(shared, EXAMPLES, "scores") as evaluator:
        together = {name: choose(evaluator, name) for name in methods}
        again = {name: choose(evaluator, name) for name in methods}
        total = evaluator.layer_forwards
    assert total == near(sum(done for _, done in together.values()))
    for name in methods:
        own = replace(shared, work=tmp_path / name)
        with open_evaluator(own, EXAMPLES, "scores") as evaluator:
            charged, done = choose(evaluator, name)
            assert charged == near(done) == near(evaluator.layer_forwards)
        assert again[name] == (near(charged), 0)
        assert together[name][0] == near(charged)
        # All but the first find something done already.
        assert together[name][1] <= charged * (1 + 1e-9)
    assert together["search"][1] < together["search"][0] / 2


# --- killed and resumed -----------------------------------------------------------------------


class KilledError(Exception):
    """Stands for the end of the process."""


@contextmanager
def dying_after(records: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let so many records be kept, and die at the next."""
    left, append = [records], ResultLog.append

    def failing(self: ResultLog, record: Mapping[str, Any]) -> None:
        # The first line is the log's head.
        if "name" in record:
            if not left[0]:
                raise KilledError
            left[0] -= 1
        append(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(ResultLog, "append", failing)
        yield


FEW_STEPS = replace(GATES, settings=replace(GATES.settings, steps=16))


@pytest.mark.parametrize(
    ("task", "examples"),
    [
        (scoring("guided", keep=2), EXAMPLES),
        # Of so few passes it takes gradients.
        (CalibrationTask((replace(GUIDED, passes=9),), 2), EXAMPLES),
        (scoring("search", keep=2), EXAMPLES),
        (CalibrationTask((FEW_STEPS,), 2), EXAMPLES),
        # More than a race's first round.
        (scoring("nll-restore", keep=2, race=True), [example_of(40, 2, i) for i in range(20)]),
    ],
    ids=["guided", "by gradients", "search", "gates", "race"],
)
def test_a_killed_choice_resumes_to_the_same_bits(
    task: CalibrationTask,
    examples: Sequence[Example],
    sources: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = run(sources["qwen3"], examples, MASKS["plain"], tmp_path / "whole")
    truth = calibrate(whole, task, silent).scores
    names = record_names(whole)
    for records in sorted({0, 1, len(names) // 2, len(names) - 1}):
        killed = replace(whole, work=tmp_path / f"killed-{records}")
        with dying_after(records, monkeypatch), pytest.raises(KilledError):
            calibrate(killed, task, silent)
        found = (killed.work / "scores.jsonl").read_bytes()
        assert found.count(b"\n") == records + 1
        told: list[str] = []
        resumed = calibrate(replace(killed, say=told.append), task, silent).scores
        taken, *rest = told
        assert f"passes of the model over each of {len(examples)} examples" in taken
        assert rest == ([f"resuming: {records} pieces were found earlier"] if records else [])
        assert json.dumps(resumed.to_json()) == json.dumps(truth.to_json())
        # What was found was not found again.
        assert (killed.work / "scores.jsonl").read_bytes().startswith(found)
        assert record_names(killed) == names


def record_names(run: CalibrationRun) -> list[str]:
    return [record["name"] for record in records_of(run.work / "scores.jsonl")]
