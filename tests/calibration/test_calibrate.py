"""Choosing layers: every selector's promises, held against exhaustive search over true losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from converter.calibration.calibrate import Task, calibrate
from converter.calibration.data.examples import DataSettings, load_examples
from converter.calibration.objective import MEAN, WORST, Objective
from converter.calibration.run import CalibrationRun
from converter.calibration.scores import Scores
from converter.calibration.selectors import SELECTORS, ExampleScores, means, rank
from converter.calibration.selectors.switching import SingleLayerScorer
from converter.inference.runner import Answer
from converter.inference.tokenizer import load_tokenizer
from converter.model.mask import Mask
from converter.plan.plan import layer_types_of
from tests.conftest import LAYERS, make_model
from tests.oracles import arbitrary, lookups, patient_greedy
from tests.runners import MASKS, Plain, example_of, run, silent

DEPTH = 6
KINDS = ("near", "far", "wide")
EXAMPLES = tuple(replace(example_of(40 + 5 * i, 2, seed=21), kind=KINDS[i % 3]) for i in range(6))
Truth = Callable[[frozenset[int]], list[float]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of six layers."""
    return make_model(tmp_path_factory.mktemp("deep") / "llama", "llama", num_hidden_layers=DEPTH)


@pytest.fixture(scope="module")
def truth(source: Path, exactly: None) -> Truth:  # noqa: ARG001 - the passes below are exact
    """Every example's loss with a set of full layers, one pass over the whole model each."""
    plain = Plain(source, MASKS["plain"])
    return cache(lambda layers: [plain.nll(e, layer_types_of(layers, DEPTH)) for e in EXAMPLES])


@pytest.fixture(scope="module")
def shared(
    source: Path,
    exactly: None,  # noqa: ARG001 - so is what is held against them
    tmp_path_factory: pytest.TempPathFactory,
) -> CalibrationRun:
    """One measurement for all, so that what one selector finds the next one knows."""
    return run(source, EXAMPLES, MASKS["plain"], tmp_path_factory.mktemp("shared"))


def mean_loss(truth: Truth, layers: frozenset[int]) -> float:
    """The mean over the examples."""
    return fmean(truth(layers))


def worst_loss(truth: Truth, layers: frozenset[int]) -> float:
    """The loss above the full model of the kind that loses most."""
    above = [a - b for a, b in zip(truth(layers), truth(frozenset(range(DEPTH))), strict=True)]
    return max(fmean(above[place :: len(KINDS)]) for place in range(len(KINDS)))


LOSS = {MEAN: mean_loss, WORST: worst_loss}


def chosen(
    measured: CalibrationRun, method: str, keep: int, objective: str = MEAN, **more: Any
) -> Scores:
    """The scores by one method."""
    task = Task((method,), keep, objective=Objective(objective), **more)
    return calibrate(measured, task, silent).scores


# --- what every selector promises -------------------------------------------------------------


@pytest.mark.parametrize("method", SELECTORS)
@pytest.mark.parametrize("objective", [MEAN, WORST])
def test_an_order_is_of_all_layers_whatever_is_kept(
    method: str, objective: str, shared: CalibrationRun
) -> None:
    for keep in (0, 1, DEPTH):
        scores = chosen(shared, method, keep, objective)
        assert sorted(scores.order) == list(range(DEPTH))
        assert len(scores.examples) == len(EXAMPLES)
        assert all(len(e.scores) == DEPTH and None not in e.scores for e in scores.examples)
        if SELECTORS[method].by_mean:
            assert scores.order == rank(means(scores.examples))


@pytest.mark.parametrize("method", SELECTORS)
def test_a_choice_is_the_same_twice(method: str, source: Path, tmp_path: Path) -> None:
    found = [
        chosen(run(source, EXAMPLES[:3], MASKS["sinks"], tmp_path / f"{i}"), method, 2)
        for i in range(2)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(("method", "objective"), [("kl", WORST), ("lazy", WORST)])
def test_scores_that_are_no_losses_know_nothing_of_the_objective(
    method: str, objective: str, shared: CalibrationRun
) -> None:
    assert chosen(shared, method, 2, objective).order == chosen(shared, method, 2).order


def periodic_plans(keep: int) -> list[list[int]]:
    """Evenly spaced layers, from every offset that leaves room for all of them."""
    plans = [[first + i * DEPTH // keep for i in range(keep)] for first in range(DEPTH)]
    return [layers for layers in plans if layers[-1] < DEPTH]


# --- searches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [MEAN, WORST])
@pytest.mark.parametrize("keep", [1, 2, 3, 5])
def test_searches_are_never_worse_than_what_they_start_from(
    objective: str, keep: int, shared: CalibrationRun, truth: Truth
) -> None:
    def loss(layers: Sequence[int]) -> float:
        return LOSS[objective](truth, frozenset(layers))

    orders = {
        name: chosen(shared, name, keep, objective).order
        for name in ("nll-restore", "nll-remove", "greedy", "search", "evolution", "surrogate")
    }
    found = {name: loss(order[:keep]) for name, order in orders.items()}
    periodic = [loss(layers) for layers in periodic_plans(keep)]
    slack = 1e-9
    assert found["search"] <= min(found["nll-restore"], found["greedy"], *periodic) + slack
    assert found["evolution"] <= found["nll-restore"] + slack
    assert found["surrogate"] <= min(found["nll-restore"], found["nll-remove"]) + slack


class Made:
    """Stands for a study of one example whose losses are made up."""

    def __init__(self, loss: Callable[[frozenset[int]], float], total: int) -> None:
        self.total = total
        self.examples = EXAMPLES[:1]
        self.loss = loss

    def losses(self, sets: Sequence[frozenset[int]]) -> list[float]:
        """As `PlanEvaluator.losses`."""
        return [self.loss(layers) for layers in sets]

    def answers(self, sets: Sequence[frozenset[int]]) -> list[list[Answer]]:
        """As `PlanEvaluator.answers`."""
        return [[Answer(self.loss(layers), False)] for layers in sets]

    def scores(self, scorer: SingleLayerScorer, layers: Sequence[int]) -> list[ExampleScores]:
        """As `PlanEvaluator.scores`."""
        answers = [found for (found,) in self.answers(scorer.sets(layers, self.total))]
        return [scorer.of_answers(EXAMPLES[0], layers, self.total, answers)]


@pytest.mark.parametrize("start", ["greedy", "restore-one", "periodic"])
@pytest.mark.parametrize("made", [arbitrary, lambda seed: lookups(9, seed)], ids=["any", "lookups"])
def test_search_takes_whichever_start_is_best(
    start: str, made: Callable[[int], Callable[[frozenset[int]], float]]
) -> None:
    """Losses with so many valleys that swaps alone lead into one that is not as deep."""
    total, keep = 9, 3
    for seed in range(40):
        loss = made(seed)
        evaluator: Any = Made(loss, total)
        starts: dict[str, list[Sequence[int]]] = {
            "greedy": [SELECTORS["greedy"].choose(evaluator, keep).order[:keep]],
            "restore-one": [sorted(range(total), key=lambda i: (loss(frozenset({i})), i))[:keep]],
            "periodic": [range(offset, total, total // keep) for offset in range(total // keep)],
        }
        found = SELECTORS["search"].choose(evaluator, keep)
        assert sorted(found.order) == list(range(total))
        best = min(loss(frozenset(layers)) for layers in starts[start])
        assert loss(frozenset(found.order[:keep])) <= best


@pytest.mark.parametrize("objective", [MEAN, WORST])
@pytest.mark.parametrize("keep", [1, 2, 4, DEPTH])
def test_greedy_is_the_patient_one(
    objective: str, keep: int, shared: CalibrationRun, truth: Truth
) -> None:
    """Six layers are no more than greedy measures at each step, so nothing is left out."""
    order = patient_greedy(lambda layers: LOSS[objective](truth, layers), DEPTH)
    assert chosen(shared, "greedy", keep, objective).order[:keep] == order[:keep]


def best_set(truth: Truth, objective: str, keep: int) -> frozenset[int]:
    """By trying all."""
    return min(
        map(frozenset, combinations(range(DEPTH), keep)),
        key=lambda layers: LOSS[objective](truth, layers),
    )


@pytest.mark.parametrize("method", ["search", "evolution", "surrogate"])
def test_the_worst_kind_decides_where_that_is_asked_for(
    method: str, shared: CalibrationRun, truth: Truth
) -> None:
    """The optima of both objectives, which differ, each found where it is asked for."""
    optimum = {objective: best_set(truth, objective, 2) for objective in (MEAN, WORST)}
    assert optimum[MEAN] != optimum[WORST]
    for objective, layers in optimum.items():
        assert set(chosen(shared, method, 2, objective).order[:2]) == layers


def test_marginal_scores_are_those_around_the_set_found(
    shared: CalibrationRun, truth: Truth
) -> None:
    scores = chosen(shared, "search", 2)
    found = frozenset(scores.order[:2])
    for layer in range(DEPTH):
        without, with_it = truth(found - {layer}), truth(found | {layer})
        gains = [a - b for a, b in zip(without, with_it, strict=True)]
        assert scores.of_layer(layer) == pytest.approx(gains, rel=0, abs=1e-9)


# --- by kind ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["nll-restore", "greedy", "surrogate"])
def test_every_kind_has_the_order_that_its_examples_alone_would_give(
    method: str, shared: CalibrationRun, source: Path, tmp_path: Path
) -> None:
    scores = chosen(shared, method, 2, by_kind=True)
    assert list(scores.profiles) == list(KINDS)
    for kind, order in scores.profiles.items():
        mine = [example for example in EXAMPLES if example.kind == kind]
        alone = run(source, mine, MASKS["plain"], tmp_path / kind)
        assert order == chosen(alone, method, 2).order
    assert len(set(scores.profiles.values())) > 1
    assert chosen(shared, method, 2).profiles == {}


def test_kinds_of_a_contest_are_ordered_by_the_method_that_won(
    source: Path, tmp_path: Path
) -> None:
    measured = run(source, EXAMPLES, MASKS["plain"], tmp_path)
    measured = replace(measured, examples=replace(measured.examples, validation=EXAMPLES[:1]))
    task = Task(("nll-remove", "greedy"), 2, by_kind=True)
    scores = calibrate(measured, task, silent).scores
    assert scores.comparison is not None
    alone = chosen(measured, scores.method, 2, by_kind=True)
    assert scores.profiles == alone.profiles


# --- examples ---------------------------------------------------------------------------------


def loaded(folder: Path, data: str, validation: int, holdout: int) -> Any:
    settings = DataSettings(
        data=data,
        samples=4,
        validation=validation,
        holdout=holdout,
        length_tokens=1000,
        min_answer_tokens=1,
        max_answer_tokens=64,
        seed=3,
    )
    return load_examples(load_tokenizer(folder), settings, Mask(4), LAYERS, 1024)


def test_what_choices_are_held_on_is_neither_scored_nor_held_out(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "\n".join(f'{{"prompt": "{"word " * (4 + i)}", "answer": "{i}"}}' for i in range(9))
    )
    for data in (str(rows), "recall"):
        found = loaded(sources["qwen3"], data, 3, 2)
        sizes = [len(found.scored), len(found.validation), len(found.held_out)]
        assert sizes == [4, 3, 2]
        assert len(set(found.all)) == 9
        # Comparing does not change what is scored.
        assert loaded(sources["qwen3"], data, 0, 2).scored == found.scored
    # What is short is the held-out part first.
    short = loaded(sources["qwen3"], str(rows), 4, 5)
    assert [len(short.scored), len(short.validation), len(short.held_out)] == [4, 4, 1]
    # Generated ones do not depend on how many others there are.
    assert loaded(sources["qwen3"], "recall", 0, 2).held_out == found.held_out
    assert loaded(sources["qwen3"], "recall", 3, 0).validation == found.validation
