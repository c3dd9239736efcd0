"""Guided search: on losses that are known, against the search that measures every layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

from converter.calibration.evaluator import open_evaluator
from converter.calibration.selectors.guided import (
    GUIDED,
    Effort,
    gates_around,
    guided_layers,
    promising_swaps,
)
from converter.calibration.selectors.search import greedy_order, refine
from converter.inference.gate_gradients import Gates
from converter.inference.positions import token_spans
from converter.model.source import open_source
from converter.pipeline import RunContext, calibration_run
from converter.settings import Settings
from tests.conftest import DEMO
from tests.oracles import Oracle, additive, gated_lookups, lookups, optimum, slopes
from tests.runners import silent

EFFORT = Effort()


def guided(seed: int, total: int, keep: int, oracle: Oracle) -> tuple[frozenset[int], int]:
    """What it finds on synthetic lookups, and how many gradients it took."""
    asked: list[Gates] = []
    loss = gated_lookups(total, seed, 24)

    def slopes_at(gates: Gates) -> list[float]:
        asked.append(gates)
        return slopes(loss, [gate for (gate,) in gates])

    return guided_layers(slopes_at, oracle, oracle, total, keep, EFFORT), len(asked)


@pytest.mark.parametrize("keep", [5, 9, 18])
def test_at_36_layers_it_does_as_well_as_search_for_a_fraction_of_the_sets(keep: int) -> None:
    above, share = [], []
    for seed in range(10):
        loss = lookups(36, seed, 24)
        mine, searched = Oracle(loss), Oracle(loss)
        found, gradients = guided(seed, 36, keep, mine)
        order = greedy_order(searched, 36, keep)
        best = refine(searched, frozenset(order[:keep]), 36)
        above.append(loss(found) - best.loss)
        # A gradient costs about three passes.
        share.append((len(mine.known) + 3 * gradients) / len(searched.known))
        assert len(found) == keep
    assert fmean(above) < 0.06
    assert fmean(share) < 0.5


def test_layers_that_act_on_their_own_are_all_found() -> None:
    gains = [3.0, 0.5, 8.0, 1.0, 2.0, 0.0]
    loss = additive(gains)
    found = guided_layers(
        lambda _: [-gain for gain in gains], Oracle(loss), Oracle(loss), 6, 3, EFFORT
    )
    assert found == optimum(loss, 6, 3) == {0, 2, 4}


def test_a_swap_counts_on_all_examples_not_on_some() -> None:
    """On a part of the examples a swap looks good; on all of them it is not."""
    part, whole = additive([0, 0, 9, 0]), additive([5, 4, 0, 0])
    found = guided_layers(lambda _: [-5, -4, -3, 0], Oracle(part), Oracle(whole), 4, 2, EFFORT)
    assert found == {0, 1}


def test_swaps_come_by_what_the_slopes_foretell_and_then_by_index() -> None:
    swaps = promising_swaps(frozenset({0, 1}), [-2.0, -1.0, -3.0, -3.0], 3)
    assert swaps == [{0, 2}, {0, 3}, {1, 2}]
    assert promising_swaps(frozenset(), [1.0], 8) == promising_swaps(frozenset({0}), [1.0], 8) == []


def test_gates_are_pulled_back_from_the_set() -> None:
    assert gates_around(frozenset({1}), 3, 0) == ((0.25,), (0.75,), (0.25,))


@pytest.mark.usefixtures("one_thread")
def test_on_a_model_it_is_no_worse_than_its_start_and_asks_for_part_of_the_examples(
    tmp_path: Path,
) -> None:
    settings = Settings(window=16, length=200, samples=6, method="guided")
    where = RunContext(tmp_path, False, silent, lambda _: None, lambda _: None)
    run = calibration_run(open_source(str(DEMO)), settings, where, comparing=False)
    few = replace(GUIDED, effort=Effort(examples=4, rounds=2))
    with (
        open_evaluator(run, run.examples.scored, "scored") as evaluator,
        evaluator.tallying("guided", 1.0, silent) as tally,
    ):
        choice = few.choose(evaluator, 2)
        found, start = evaluator.losses([frozenset(choice.order[:2]), frozenset({0, 4})])
    assert sorted(choice.order) == list(range(8))
    assert found < start
    assert [example.scores[0] is None for example in choice.examples] == [False] * 4 + [True] * 2
    spans = token_spans(run.examples.scored[0], run.mask)
    assert tally.layer_forwards < 6 * few.cost(spans, run.mask, 8, 2)
