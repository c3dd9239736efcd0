"""A study: true losses of any sets of layers, and scores, each found once and kept."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch

from converter.calibration.calibrate import calibrate
from converter.calibration.evaluator import Layers, PlanEvaluator, open_evaluator
from converter.calibration.log import ResultLog
from converter.calibration.objective import MEAN, WORST, Objective
from converter.calibration.run import CalibrationRun
from converter.calibration.selectors import SCORERS, SELECTORS
from converter.common.errors import ScoresError
from converter.inference.example import Example
from converter.inference.runner import ModelRunner
from converter.model.mask import Mask
from converter.plan.plan import layer_types_of
from tests.conftest import LAYERS
from tests.runners import MASKS, Counter, Plain, example_of, measurement, scoring, silent

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
    """Equal but for the order of the sums."""
    return pytest.approx(value, rel=0, abs=1e-9)


@pytest.fixture(params=["plain", "sinks and full decode"])
def mask(request: pytest.FixtureRequest) -> Mask:
    return MASKS[request.param]


@pytest.fixture
def measured(sources: dict[str, Path], tmp_path: Path) -> CalibrationRun:
    return measurement(sources["qwen3"], EXAMPLES, MASKS["plain"], tmp_path / "work")


@contextmanager
def studying(measured: CalibrationRun, objective: str = MEAN) -> Iterator[PlanEvaluator]:
    """A study of the scored examples, with somebody asking."""
    with (
        open_evaluator(
            measured, measured.examples.scored, "scores", Objective(objective)
        ) as evaluator,
        evaluator.tallying("test", 0, silent),
    ):
        yield evaluator


@dataclass
class Asked:
    """What the model was run on: pairs of a set of full layers and an example."""

    pairs: list[tuple[Layers, Example]]

    def note(self, examples: Sequence[Example], plans: Sequence[Sequence[str]]) -> None:
        """Add a call."""
        for plan in plans:
            full = frozenset(i for i, kind in enumerate(plan) if kind == "full_attention")
            self.pairs += [(full, example) for example in examples]

    def take(self) -> list[tuple[Layers, Example]]:
        """Everything since the last time."""
        taken, self.pairs = self.pairs, []
        return taken


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Watches what the meter is asked for."""
    kept = Asked([])
    for name in ("answers", "answer_states"):
        method = getattr(ModelRunner, name)

        def watched(
            self: ModelRunner, examples: Any, plans: Any, advance: Any, *, _method: Any = method
        ) -> Any:
            kept.note(examples, plans)
            return _method(self, examples, plans, advance)

        monkeypatch.setattr(ModelRunner, name, watched)
    return kept


def brute_force(
    sources: dict[str, Path], mask: Mask, examples: Sequence[Example] = EXAMPLES
) -> dict[Layers, list[float]]:
    """Every set's loss on every example, one pass each over the whole model."""
    plain = Plain(sources["qwen3"], mask)
    return {
        layers: [plain.nll(example, layer_types_of(layers, LAYERS)) for example in examples]
        for layers in EVERY_SET
    }


def worst_kind(
    losses: Sequence[float], full: Sequence[float], examples: Sequence[Example]
) -> float:
    """By the definition: of each kind the mean loss above the full model, and the highest."""
    return max(
        fmean(
            a - b
            for a, b, example in zip(losses, full, examples, strict=True)
            if example.kind == kind
        )
        for kind in {example.kind for example in examples}
    )


# --- true losses ------------------------------------------------------------------------------


def test_losses_of_all_sets_are_those_of_the_whole_model(
    mask: Mask, sources: dict[str, Path], tmp_path: Path
) -> None:
    truth = brute_force(sources, mask)
    measured = measurement(sources["qwen3"], EXAMPLES, mask, tmp_path / "work")
    # In any order, and of one set twice.
    sets = random.Random(1).sample(EVERY_SET, len(EVERY_SET))  # noqa: S311 - reproducible
    sets.append(sets[3])
    with studying(measured) as evaluator:
        assert evaluator.losses(sets) == near([fmean(truth[s]) for s in sets])
        for answers, layers in zip(evaluator.answers(sets), sets, strict=True):
            assert [a.nll for a in answers] == near(truth[layers])
    full = truth[frozenset(range(LAYERS))]
    with studying(measured, WORST) as evaluator:
        assert evaluator.losses(sets) == near([worst_kind(truth[s], full, EXAMPLES) for s in sets])
        # Not the same question as the mean: else a mean taken for it would go unseen.
        by_mean = sorted(EVERY_SET, key=lambda s: fmean(truth[s]))
        by_worst = sorted(EVERY_SET, key=lambda s: worst_kind(truth[s], full, EXAMPLES))
        assert by_mean != by_worst


@pytest.mark.parametrize("objective", [MEAN, WORST])
def test_losses_on_the_first_examples_are_of_those_alone(
    objective: str, measured: CalibrationRun, sources: dict[str, Path], asked: Asked
) -> None:
    truth = brute_force(sources, MASKS["plain"])
    full, sets = truth[frozenset(range(LAYERS))], [frozenset({1}), frozenset({0, 3})]
    with studying(measured, objective) as evaluator:
        for count in (1, 3, 5):
            asked.take()
            found = evaluator.losses(sets, count)
            expected = [
                fmean(truth[s][:count])
                if objective == MEAN
                else worst_kind(truth[s][:count], full[:count], EXAMPLES[:count])
                for s in sets
            ]
            assert found == near(expected)
            assert {example for _, example in asked.take()} <= set(EXAMPLES[:count])
        begun = evaluator.answers(sets, count=4, begin=2)
        assert [a.nll for a in begun[1]] == near(truth[sets[1]][2:4])


def test_scores_by_one_switch_are_differences_of_true_losses(
    measured: CalibrationRun, sources: dict[str, Path]
) -> None:
    truth = brute_force(sources, MASKS["plain"])
    none, full = frozenset[int](), frozenset(range(LAYERS))
    with studying(measured) as evaluator:
        restored = evaluator.scores(SCORERS["nll-restore"], range(LAYERS))
        removed = evaluator.scores(SCORERS["nll-remove"], (2, 0), count=4, begin=1)
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


@pytest.mark.parametrize("method", ["kl", "first-order"])
def test_scores_that_are_no_losses_are_the_meters_own_and_found_once(
    method: str, measured: CalibrationRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = SCORERS[method]
    runner, _ = measured.runner(scorer.needs_gradients)
    truth = scorer.measure(runner, EXAMPLES, range(LAYERS), lambda _: None)
    with studying(measured) as evaluator:
        for view, examples in ((evaluator.only("far"), EXAMPLES[1::3]), (evaluator, EXAMPLES)):
            found = view.scores(scorer, range(LAYERS))
            expected = [truth[EXAMPLES.index(example)] for example in examples]
            for mine, theirs in zip(found, expected, strict=True):
                assert mine.scores == near(theirs.scores)
                assert mine.kind == theirs.kind
        monkeypatch.setattr(CalibrationRun, "meter", None)
        assert evaluator.scores(scorer, range(LAYERS), count=4, begin=2) == found[2:4]


# --- each thing once --------------------------------------------------------------------------


def test_a_set_is_run_once_on_each_example_whoever_asks(
    measured: CalibrationRun, asked: Asked
) -> None:
    one, two, three = frozenset({0}), frozenset({0, 1}), frozenset({3})
    with studying(measured, WORST) as evaluator:
        evaluator.losses([one, two], count=2)
        evaluator.losses([two, one, two])
        evaluator.only("far").losses([three])
        evaluator.scores(SCORERS["nll-restore"], range(LAYERS))
        evaluator.losses([three, one])
        with evaluator.tallying("another", 0, silent):
            evaluator.losses([one, two, three])
    pairs = asked.take()
    assert len(set(pairs)) == len(pairs)
    # The sets above, those of restore-one, and the full model, which the objective wants.
    sets = {one, two, three, frozenset[int](), frozenset(range(LAYERS))}
    sets |= {frozenset({i}) for i in range(LAYERS)}
    assert set(pairs) == {(layers, example) for layers in sets for example in EXAMPLES}


def test_a_later_study_runs_nothing_again(measured: CalibrationRun, asked: Asked) -> None:
    sets = EVERY_SET[::2]
    with studying(measured) as evaluator:
        found = evaluator.losses(sets)
        assert evaluator.found_earlier == 0
    assert asked.take()
    with studying(measured) as evaluator:
        assert evaluator.found_earlier > 0
        assert evaluator.losses(sets) == found
    assert asked.take() == []
    with (
        pytest.raises(ScoresError, match="the data differs"),
        open_evaluator(measured, EXAMPLES[:2], "scores"),
    ):
        pass
    with studying(replace(measured, fresh=True)) as evaluator:
        assert evaluator.found_earlier == 0
        assert evaluator.losses(sets) == found
    assert asked.take()


def test_a_view_of_one_kind_knows_what_the_whole_knows(
    measured: CalibrationRun, sources: dict[str, Path], asked: Asked
) -> None:
    truth = brute_force(sources, MASKS["plain"])
    with studying(measured) as evaluator:
        evaluator.losses(EVERY_SET[:8])
        asked.take()
        for kind in ("near", "far"):
            view = evaluator.only(kind)
            mine = [i for i, example in enumerate(EXAMPLES) if example.kind == kind]
            assert view.examples == tuple(EXAMPLES[i] for i in mine)
            assert view.losses(EVERY_SET[:8]) == near(
                [fmean(truth[s][i] for i in mine) for s in EVERY_SET[:8]]
            )
            scores = view.scores(SCORERS["nll-restore"], range(3), count=2, begin=1)
            assert [s.prompt_tokens for s in scores] == [len(EXAMPLES[mine[1]].prompt)]
            assert asked.take() == []
        # And the other way round: the whole runs a view's set on the other kind only.
        evaluator.only("far").losses(EVERY_SET[9:10], count=1)
        assert [example for _, example in asked.take()] == [EXAMPLES[1]]
        evaluator.losses(EVERY_SET[9:10])
        assert {example for _, example in asked.take()} == set(EXAMPLES) - {EXAMPLES[1]}


def test_what_is_charged_is_what_it_would_have_cost_alone(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    """Held against the layer-forwards that a study of one's own really runs."""
    methods = ("nll-restore", "two-sided", "greedy", "kl", "search")

    def choose(evaluator: PlanEvaluator, name: str) -> tuple[float, float]:
        """Layer-forwards charged, and run."""
        bar = Counter()

        @contextmanager
        def progress(_title: str, _amount: float) -> Iterator[Counter]:
            yield bar

        with evaluator.tallying(name, 0, progress) as tally:
            SELECTORS[name].choose(evaluator, 2)
        return tally.layer_forwards, bar.done

    shared = measurement(sources["qwen3"], EXAMPLES, MASKS["plain"], tmp_path / "shared")
    with open_evaluator(shared, EXAMPLES, "scores") as evaluator:
        together = {name: choose(evaluator, name) for name in methods}
        again = {name: choose(evaluator, name) for name in methods}
        total = evaluator.layer_forwards
    assert total == near(sum(run for _, run in together.values()))
    for name in methods:
        own = replace(shared, work=tmp_path / name)
        with open_evaluator(own, EXAMPLES, "scores") as evaluator:
            charged, run = choose(evaluator, name)
            assert charged == near(run) == near(evaluator.layer_forwards)
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
        # The first line is the journal's head.
        if "name" in record:
            if not left[0]:
                raise KilledError
            left[0] -= 1
        append(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(ResultLog, "append", failing)
        yield


@pytest.mark.parametrize("method", ["two-sided", "search", "evolution", "surrogate", "beam"])
def test_a_killed_choice_resumes_to_the_same_bits(
    method: str, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = scoring(method, keep=2)
    whole = measurement(sources["qwen3"], EXAMPLES, MASKS["plain"], tmp_path / "whole")
    truth = calibrate(whole, task, silent).scores
    log = (tmp_path / "whole" / "scores.jsonl").read_text().splitlines()
    for records in sorted({0, 1, len(log) // 2, len(log) - 2}):
        killed = replace(whole, work=tmp_path / f"killed-{records}")
        with dying_after(records, monkeypatch), pytest.raises(KilledError):
            calibrate(killed, task, silent)
        told: list[str] = []
        resumed = calibrate(replace(killed, say=told.append), task, silent).scores
        assert told == ([f"resuming: {records} pieces were found earlier"] if records else [])
        assert resumed == truth


# --- foretold losses --------------------------------------------------------------------------

KNOWN = [frozenset[int](), frozenset({0}), frozenset({1, 3}), frozenset(range(LAYERS))]


class Mixing(Plain):
    """The loaded model, whose answer rows above the layers are sums of those of several plans."""

    def mixed(self, example: Example, sets: Sequence[Layers], weights: Sequence[float]) -> float:
        """The mean loss of the answer tokens of such a sum."""
        states: list[torch.Tensor] = []

        def keep(_module: Any, inputs: tuple[torch.Tensor]) -> None:
            states.append(inputs[0])

        def put(_module: Any, _inputs: Any) -> tuple[torch.Tensor]:
            return (torch.stack([w * s for w, s in zip(weights, states, strict=True)]).sum(0),)

        norm = self.model.get_decoder().norm
        handle = norm.register_forward_pre_hook(keep)
        for layers in sets:
            self.nll(example, layer_types_of(layers, LAYERS))
        handle.remove()
        handle = norm.register_forward_pre_hook(put)
        try:
            return self.nll(example, layer_types_of((), LAYERS))
        finally:
            handle.remove()


@pytest.mark.parametrize("objective", [MEAN, WORST])
def test_a_known_set_is_foretold_as_it_is(objective: str, measured: CalibrationRun) -> None:
    with studying(measured, objective) as evaluator, evaluator.keeping_states():
        losses = evaluator.losses(KNOWN)
        assert len(set(losses)) == len(KNOWN)
        assert evaluator.foretold_losses(KNOWN, np.eye(len(KNOWN))) == near(losses)
        picked = [2, 0, 2]
        foretold = evaluator.foretold_losses(KNOWN, np.eye(len(KNOWN))[picked])
        assert foretold == near([losses[i] for i in picked])


def test_a_sum_is_foretold_by_the_heads_of_its_states(
    measured: CalibrationRun, sources: dict[str, Path]
) -> None:
    plain = Mixing(sources["qwen3"], MASKS["plain"])
    weights = np.array([[0.5, 0.25, 0.5, -0.25], [0, 2, -1, 0], [0.25, 0.25, 0.25, 0.25]])
    truth = [[plain.mixed(example, KNOWN, row) for example in EXAMPLES] for row in weights.tolist()]
    with studying(measured) as evaluator, evaluator.keeping_states():
        evaluator.losses(KNOWN)
        found = evaluator.foretold_losses(KNOWN, weights)
        assert found == near([fmean(row) for row in truth])
        far = evaluator.only("far").foretold_losses(KNOWN, weights)
        assert far == near([fmean((row[1], row[4])) for row in truth])


def test_states_that_are_gone_are_made_again(measured: CalibrationRun, asked: Asked) -> None:
    weights = np.array([[0.5, 0.25, 0.5, -0.25]])
    with studying(measured) as evaluator, evaluator.keeping_states():
        losses = evaluator.losses(KNOWN)
        truth = evaluator.foretold_losses(KNOWN, weights)
    asked.take()
    # The losses are in the notebook, and what they were found from was only in memory.
    with studying(measured) as evaluator, evaluator.keeping_states():
        assert evaluator.losses(KNOWN) == losses
        assert asked.take() == []
        assert evaluator.foretold_losses(KNOWN, weights) == truth
        assert sorted(len(layers) for layers, _ in asked.take()) == sorted(
            len(layers) for layers in KNOWN for _ in EXAMPLES
        )
        assert evaluator.foretold_losses(KNOWN, weights) == truth
        assert asked.take() == []
