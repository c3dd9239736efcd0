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

from converter.calibration.calibrate import calibrate
from converter.calibration.data.examples import load_examples
from converter.calibration.data.settings import DataSettings
from converter.calibration.run import CalibrationRun
from converter.calibration.scores import Scores, means, rank
from converter.calibration.selectors import MEASURING, SELECTORS, LayerSelector
from converter.calibration.selectors.search import greedy_order
from converter.inference.runner import Answer
from converter.inference.tokenizer import load_tokenizer
from converter.model.mask import Mask
from converter.plan.plan import layer_types_of
from converter.plan.units import Units
from tests.conftest import LAYERS, make_model
from tests.oracles import arbitrary, lookups
from tests.runners import MASKS, Plain, example_of, run, scoring, silent

DEPTH = 6
KINDS = ("near", "far", "wide")
EXAMPLES = tuple(replace(example_of(40 + 5 * i, 2, seed=21), kind=KINDS[i % 3]) for i in range(6))
Truth = Callable[[frozenset[int]], list[float]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    """One calibration for all, so that what one selector finds the next one knows."""
    return run(source, EXAMPLES, MASKS["plain"], tmp_path_factory.mktemp("shared"))


def chosen(measured: CalibrationRun, method: str, keep: int, *, by_kind: bool = False) -> Scores:
    return calibrate(measured, scoring(method, keep, by_kind=by_kind), silent).scores


# --- what every selector promises -------------------------------------------------------------


@pytest.mark.parametrize("method", MEASURING)
def test_an_order_is_of_all_layers_whatever_is_kept(method: str, shared: CalibrationRun) -> None:
    for keep in (0, 1, DEPTH):
        scores = chosen(shared, method, keep)
        assert sorted(scores.order) == list(range(DEPTH))
        assert len(scores.examples) == len(EXAMPLES)
        assert all(len(e.scores) == DEPTH and None not in e.scores for e in scores.examples)
        assert scores.unit == SELECTORS[method].unit
        if isinstance(SELECTORS[method], LayerSelector):
            assert scores.order == rank(means(scores.examples))
            assert scores.by_mean


@pytest.mark.parametrize("method", MEASURING)
def test_a_choice_is_the_same_twice(method: str, source: Path, tmp_path: Path) -> None:
    folders = (tmp_path / "first", tmp_path / "second")
    runs = [run(source, EXAMPLES[:3], MASKS["sinks"], folder) for folder in folders]
    assert chosen(runs[0], method, 2) == chosen(runs[1], method, 2)


# --- searches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 3, 5])
def test_search_is_never_worse_than_what_it_starts_from(
    keep: int, shared: CalibrationRun, truth: Truth
) -> None:
    found = {
        name: fmean(truth(frozenset(chosen(shared, name, keep).order[:keep])))
        for name in ("nll-restore", "search")
    }
    plans = [[first + i * DEPTH // keep for i in range(keep)] for first in range(DEPTH)]
    periodic = [fmean(truth(frozenset(layers))) for layers in plans if layers[-1] < DEPTH]
    assert found["search"] <= min(found["nll-restore"], *periodic) + 1e-9


class Made:
    """Stands for an evaluator of one example whose losses are made up."""

    def __init__(self, loss: Callable[[frozenset[int]], float], total: int) -> None:
        self.total, self.units = total, Units(total)
        self.examples = EXAMPLES[:1]
        self.losses = lambda sets: [loss(layers) for layers in sets]
        self.answers = lambda sets, *_: [[Answer(loss(layers), False)] for layers in sets]


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
            "greedy": [greedy_order(evaluator.losses, total, keep)[:keep]],
            "restore-one": [sorted(range(total), key=lambda i: (loss(frozenset({i})), i))[:keep]],
            "periodic": [range(offset, total, total // keep) for offset in range(total // keep)],
        }
        found = SELECTORS["search"].choose(evaluator, keep)
        assert sorted(found.order) == list(range(total))
        best = min(loss(frozenset(layers)) for layers in starts[start])
        assert loss(frozenset(found.order[:keep])) <= best


def test_search_finds_the_best_set_of_all(shared: CalibrationRun, truth: Truth) -> None:
    optimum = min(map(frozenset, combinations(range(DEPTH), 2)), key=lambda s: fmean(truth(s)))
    assert set(chosen(shared, "search", 2).order[:2]) == optimum


def test_marginal_scores_are_those_around_the_set_found(
    shared: CalibrationRun, truth: Truth
) -> None:
    scores = chosen(shared, "search", 2)
    found = frozenset(scores.order[:2])
    for layer in range(DEPTH):
        without, with_it = truth(found - {layer}), truth(found | {layer})
        gains = [a - b for a, b in zip(without, with_it, strict=True)]
        assert scores.of_unit(layer) == pytest.approx(gains, rel=0, abs=1e-9)


# --- by kind ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["nll-restore", "search"])
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
    task = scoring("nll-remove,search", 2, by_kind=True)
    scores = calibrate(measured, task, silent).scores
    assert scores.comparison is not None
    alone = chosen(measured, scores.method, 2, by_kind=True)
    assert scores.profiles == alone.profiles


# --- examples ---------------------------------------------------------------------------------


def loaded(folder: Path, data: str, validation: int, holdout: int) -> Any:
    settings = DataSettings(data, 4, validation, holdout, 1000, 1, 64, seed=3)
    return load_examples(load_tokenizer(folder), settings, Mask(4), LAYERS, 1024)


def test_what_choices_are_held_on_is_neither_scored_nor_held_out(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = (f'{{"prompt": "{"word " * (4 + i)}", "answer": "{i}"}}' for i in range(9))
    rows.write_text("\n".join(lines))
    for data in (str(rows), "recall"):
        found = loaded(sources["qwen3"], data, 3, 2)
        assert [len(found.scored), len(found.validation), len(found.held_out)] == [4, 3, 2]
        assert len(set(found.all)) == 9
        # Comparing does not change what is scored.
        assert loaded(sources["qwen3"], data, 0, 2).scored == found.scored
    # What is short is the held-out part first.
    short = loaded(sources["qwen3"], str(rows), 4, 5)
    assert [len(short.scored), len(short.validation), len(short.held_out)] == [4, 4, 1]
    # Generated ones do not depend on how many others there are.
    assert loaded(sources["qwen3"], "recall", 0, 2).held_out == found.held_out
    assert loaded(sources["qwen3"], "recall", 3, 0).validation == found.validation
