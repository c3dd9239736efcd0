"""Races: clear layers are decided early and rightly, ties are left open, and runs resume."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.calibration.calibrate import CalibrationTask, calibrate
from converter.calibration.scores import Race, Scores, rank
from converter.calibration.selectors.racing import after_round, round_ends
from converter.inference.load import Placement
from converter.model.mask import Mask
from tests.conftest import LAYERS, make_model
from tests.runners import example_of, run, scoring, silent

Table = Sequence[Sequence[float]]


def run_race(table: Table, keep: int) -> tuple[Race, Race]:
    """A whole race over (examples, layers) of scores: after its first round, and at its end."""
    race, total = Race(keep), len(table[0])
    ends = round_ends(len(table))
    first = None
    for begin, end in zip((0, *ends), ends, strict=False):
        layers = race.open_layers(range(total))
        if not layers:
            break
        scores = {layer: [row[layer] for row in table[:end]] for layer in layers}
        race = after_round(race, scores, len(ends), end - begin)
        first = first or race
    assert first is not None
    return first, race


def noisy(
    means: Sequence[float], examples: int, seed: int, noise: float = 1.0, shared: float = 1.0
) -> Table:
    """Scores around their true means, with an error that the layers of an example share in part."""
    generator = random.Random(seed)  # noqa: S311 - reproducible
    table = []
    for _ in range(examples):
        common = generator.gauss(0, shared)
        table.append([mean + common + generator.gauss(0, noise) for mean in means])
    return table


@given(st.integers(1, 500))
def test_rounds_double_up_to_all_examples(examples: int) -> None:
    ends = round_ends(examples)
    assert ends[0] == min(16, examples)
    assert ends[-1] == examples
    assert list(ends) == sorted(set(ends))
    assert all(b == 2 * a for a, b in pairwise(ends[:-1]))
    assert round_ends(64) == (16, 32, 64)
    assert round_ends(40) == (16, 32, 40)
    assert round_ends(3) == (3,)


@pytest.mark.parametrize("gap", [0.25, 0.5, 1.0])
def test_a_decision_is_wrong_no_more_often_than_it_says(gap: float) -> None:
    """Wrong: a layer of the true best accepted that is not, or rejected that is; at most 5%."""
    means, keep, trials = [3 * gap, 2 * gap, 2 * gap, gap, gap, 0.0], 3, 300
    best = set(rank(means)[:keep])
    wrong = 0
    for seed in range(trials):
        _, race = run_race(noisy(means, 64, seed), keep)
        wrong += not set(race.accepted) <= best or bool(best & set(race.rejected))
    # 95% confidence in all of a race's comparisons: 15 of 300 expected at the very most.
    assert wrong <= 0.05 * trials


def test_layers_of_equal_worth_are_seldom_decided_between() -> None:
    """The hardest case: any decision at the boundary is wrong, for there is no difference."""
    decided = 0
    for seed in range(300):
        _, race = run_race(noisy([1.0] * 4, 64, seed), 2)
        decided += bool(race.accepted or race.rejected)
    assert decided <= 0.05 * 300


def test_clear_cases_are_decided_after_the_first_round() -> None:
    means = [0.0, 5.0, 0.0, 5.0, 0.0, 0.0]
    for seed in range(20):
        first, race = run_race(noisy(means, 64, seed, noise=0.3, shared=0.3), 2)
        assert first == race
        assert race == Race(2, (1, 3), (0, 2, 4, 5), (), ((16, 6),))
        assert race.open_layers(range(6)) == ()


def test_only_what_is_close_goes_on() -> None:
    """The best and the worst are decided; two layers of equal worth are left for all rounds."""
    means = [9.0, 1.0, 1.0, -9.0]
    table = [
        [mean + (0.5 if (row + layer) % 2 else -0.5) for layer, mean in enumerate(means)]
        for row in range(64)
    ]
    first, race = run_race(table, 2)
    assert (first.accepted, first.rejected) == ((0,), (3,))
    assert race.rounds == ((16, 4), (16, 2), (32, 2))
    assert race.open_layers(range(4)) == (1, 2)
    assert [race.place(layer) for layer in range(4)] == [0, 1, 1, 2]


def test_a_difference_that_all_examples_share_does_not_hide_one() -> None:
    """Paired: examples differ far more than layers do, and the race does not mind."""
    _, race = run_race(noisy([1.0, 0.0], 16, 1, noise=0.1, shared=100.0), 1)
    assert (race.accepted, race.rejected) == ((0,), (1,))


def test_exactly_equal_scores_decide_nothing_and_exact_differences_everything() -> None:
    _, race = run_race([[1.0, 1.0, 1.0]] * 16, 1)
    assert (race.accepted, race.rejected) == ((), ())
    _, race = run_race([[2.0, 1.0, 1.0]] * 16, 1)
    assert race.open_layers(range(3)) == ()
    assert race.accepted == (0,)
    # A single example decides nothing.
    _, race = run_race([[5.0, 0.0, 1.0]], 1)
    assert race == Race(1, rounds=((1, 3),))


@given(total=st.integers(1, 8), data=st.data())
def test_no_layer_is_open_once_the_places_are_given_away(total: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(0, total))
    accepted = data.draw(st.sets(st.integers(0, total - 1), max_size=keep))
    others = sorted(set(range(total)) - accepted)
    rejected = data.draw(st.sets(st.sampled_from(others or [0]), max_size=total - keep))
    rejected &= set(others)
    race = Race(keep, tuple(sorted(accepted)), tuple(sorted(rejected)))
    left = tuple(layer for layer in others if layer not in rejected)
    given_away = keep in (len(accepted), len(accepted) + len(left))
    assert race.open_layers(range(total)) == (() if given_away else left)
    for layer in range(total):
        expected = 0 if layer in accepted else 2 if layer in rejected else 1
        assert race.place(layer) == expected
    assert Race.from_json(json.loads(json.dumps(asdict(race))), range(total)) == race


# --- races of a real model --------------------------------------------------------------------

EXAMPLES = [example_of(40, 2, seed) for seed in range(20)]
MASK = Mask(8)
DEEP = 8


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep") / "m"
    return make_model(folder, "qwen3", num_hidden_layers=DEEP, max_window_layers=DEEP)


def raced(folder: Path, work: Path, task: CalibrationTask, **more: Any) -> Scores:
    placement = Placement("cpu", "float32")
    measured = run(folder, EXAMPLES, MASK, work, placement=placement, **more)
    return calibrate(measured, task, silent).scores


RACING = scoring("nll-restore", 3, race=True)


@pytest.fixture(scope="module")
def uninterrupted(deep: Path, tmp_path_factory: pytest.TempPathFactory) -> Scores:
    return raced(deep, tmp_path_factory.mktemp("uninterrupted"), RACING)


def test_a_race_agrees_with_exact_scores_on_what_it_scored(
    deep: Path, uninterrupted: Scores, tmp_path: Path
) -> None:
    exact = raced(deep, tmp_path / "exact", scoring("nll-restore"))
    scores, race = uninterrupted, uninterrupted.race
    assert race is not None
    assert exact.race is None
    means = [estimate.mean for estimate in exact.estimates]
    assert len(scores.examples) == sum(n for n, _ in race.rounds)
    for left, right in zip(scores.examples, exact.examples, strict=False):
        for layer in range(DEEP):
            if left.scores[layer] is not None:
                assert left.scores[layer] == pytest.approx(right.scores[layer], abs=1e-5)
    # All layers still open are scored on the same examples; decided ones on fewer.
    counts = [len(scores.of_unit(layer)) for layer in range(DEEP)]
    scored = sum(n for n, _ in race.rounds)
    assert all(counts[layer] == scored for layer in race.open_layers(range(DEEP)))
    # Every certain decision between raced layers is the one that all examples make.
    for inside in race.accepted:
        for outside in race.rejected:
            assert means[inside] > means[outside]
    assert scores.layer_forwards <= exact.layer_forwards
    assert scores.by_mean
    places = [race.place(layer) for layer in scores.order]
    assert places == sorted(places)


@pytest.mark.parametrize("keep", [0, LAYERS])
def test_nothing_is_raced_where_there_is_nothing_to_choose(
    keep: int, sources: dict[str, Path], tmp_path: Path
) -> None:
    measured = run(sources["qwen3"], EXAMPLES[:2], MASK, tmp_path / "work")
    scores = calibrate(measured, scoring("nll-remove", keep, race=True), silent).scores
    assert scores.race is None
    assert all(None not in example.scores for example in scores.examples)


def test_a_race_for_another_budget_shares_what_is_known(deep: Path, tmp_path: Path) -> None:
    """What the first round found is found once, and each race decides what it would alone."""
    raced(deep, tmp_path / "work", RACING)
    told: list[str] = []
    for number, task in enumerate((replace(RACING, keep=2), scoring("nll-restore"))):
        shared = raced(deep, tmp_path / "work", task, say=told.append)
        alone = raced(deep, tmp_path / f"alone {number}", task)
        assert shared.race == alone.race
        assert shared.order == alone.order
        assert shared.layer_forwards == alone.layer_forwards
    assert len([line for line in told if line.startswith("resuming")]) == 2
