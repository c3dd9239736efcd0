"""Guided search: on losses that are known, against the search that measures every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from statistics import fmean

import pytest

from converter.calibration.calibrate import CalibrationTask
from converter.calibration.evaluator import open_evaluator
from converter.calibration.selectors import BEST, EFFORTS, selectors_of
from converter.calibration.selectors import guided as search_by_gradients
from converter.calibration.selectors.guided import (
    GUIDED,
    gates_around,
    guided_set,
    mixed,
    nested_order,
    path_order,
)
from converter.calibration.selectors.search import (
    SEARCH,
    greedy_order,
    promising_swaps,
    refine,
)
from converter.inference.gate_gradients import Gates
from converter.inference.positions import TokenSpans
from converter.model.mask import FULL, LINEAR, Mask
from converter.model.source import open_source
from converter.pipeline import RunContext, calibration_run
from converter.plan.units import Units
from converter.settings import Settings
from tests.conftest import DEMO
from tests.oracles import Loss, Oracle, additive, gated_lookups, lookups, optimum, slopes
from tests.runners import silent

EVERYTHING = frozenset(range(36))


class Lookups:
    """Synthetic lookups of 36 layers, and how many gradients and sets they were asked for."""

    def __init__(self, seed: int) -> None:
        self.loss = lookups(36, seed, 24)
        self.sets = Oracle(self.loss)
        self.gradients = 0
        self._gated = gated_lookups(36, seed, 24)
        self.searched = Oracle(self.loss)
        self.asked = search_by_gradients.Oracle(
            self._slopes, lambda sets, _: self.sets(sets), 64, self._within_budget
        )

    @property
    def cost(self) -> int:
        """In sets; a gradient costs about three passes."""
        return len(self.sets.known) + 3 * self.gradients

    def _within_budget(self, _passes: float) -> bool:
        return self.cost < 60

    def _slopes(self, gates: Gates) -> list[float]:
        self.gradients += 1
        return slopes(self._gated, [gate for (gate,) in gates])

    def greedy(self, keep: int) -> tuple[int, ...]:
        """The order of a search that measures every layer."""
        return greedy_order(self.searched, 36, keep)


def known(slopes: Sequence[float], *losses: Loss) -> search_by_gradients.Oracle:
    """Slopes that are the same everywhere, and the loss on the first 16, 32, ... examples."""
    ends = [16 * 2**step for step in range(len(losses))]
    return search_by_gradients.Oracle(
        lambda _: slopes,
        lambda sets, end: list(map(losses[ends.index(end)], sets)),
        ends[-1],
        lambda _: True,
    )


@pytest.mark.parametrize("keep", [5, 9, 18])
def test_at_36_layers_it_does_as_well_as_search_for_a_fraction_of_the_sets(keep: int) -> None:
    above, share = [], []
    for seed in range(6):
        case = Lookups(seed)
        start = frozenset(path_order(case.asked.slopes_at, Units(36))[:keep])
        found, _ = guided_set(case.asked, start, EVERYTHING, Units(36))
        order = case.greedy(keep)
        best = refine(case.searched, frozenset(order[:keep]), 36)
        above.append(case.loss(found) - best.loss)
        share.append(case.cost / len(case.searched.known))
        assert len(found) == keep
    assert fmean(above) < 0.06
    assert fmean(share) < 0.5


def test_one_order_serves_every_number_of_layers() -> None:
    """Its fronts lose little more than those of the greedy order, which measures every layer."""
    above = []
    for seed in range(4):
        case = Lookups(seed)
        path = path_order(case.asked.slopes_at, Units(36))
        order, _ = nested_order(case.asked, [case.asked.may_go_on] * 3, path, Units(36))
        assert sorted(order) == list(range(36))
        greedy = case.greedy(36)
        for count in (2, 5, 9, 14, 18, 24, 30):
            fronts = frozenset(order[:count]), frozenset(greedy[:count])
            mine, theirs = map(case.loss, fronts)
            above.append(mine - theirs)
    assert fmean(above) < 0.08


def test_layers_that_act_on_their_own_are_all_found() -> None:
    gains = [3.0, 0.5, 8.0, 1.0, 2.0, 0.0]
    loss, start = additive(gains), frozenset({1, 3, 5})
    oracle = known([-gain for gain in gains], loss)
    found, gates = guided_set(oracle, start, frozenset(range(6)), Units(6))
    assert found == optimum(loss, 6, 3) == {0, 2, 4}
    assert gates == gates_around(found, Units(6), 1)
    # Layers that are not free stay where they are.
    assert guided_set(oracle, start, frozenset({0, 1, 2, 3}), Units(6))[0] == {0, 2, 5}


def test_a_swap_counts_on_all_examples_not_on_some() -> None:
    """On a part of the examples a swap looks good; on all of them it is not."""
    part, whole = additive([0, 0, 9, 0]), additive([5, 4, 0, 0])
    oracle = known([-5, -4, -3, 0], part, whole)
    assert guided_set(oracle, frozenset({0, 1}), frozenset(range(4)), Units(4))[0] == {0, 1}


def test_swaps_come_by_what_the_slopes_foretell_and_then_by_index() -> None:
    swaps = promising_swaps(frozenset({0, 1}), [-2.0, -1.0, -3.0, -3.0], frozenset(range(4)))
    assert swaps == [{0, 2}, {0, 3}, {1, 2}, {1, 3}]
    assert promising_swaps(frozenset({0, 1}), [0.0] * 3, frozenset({1, 2})) == [{0, 2}]
    assert promising_swaps(frozenset(), [1.0], frozenset({0})) == []


def test_a_layer_that_a_gradient_misjudges_does_not_take_all_tries() -> None:
    """Layer 0 answers everything, so its slope is flat where it is nearly full."""
    loss, start = additive([9, 0, 0, 1, *[0] * 7]), frozenset({0, 1, 2})
    oracle = known([0.5, 0.1, 0.1, -0.2, *[-0.1] * 7], loss)
    steps = chain([True, True], repeat(False))
    oracle = replace(oracle, may_go_on=lambda _: next(steps))
    assert guided_set(oracle, start, frozenset(range(11)), Units(11))[0] == {0, 1, 3}


def test_with_passes_left_every_layer_is_tried_once_beside_the_set() -> None:
    """Layer 19 does as layer 0, so its slope beside it hides what both do together."""
    loss = additive([5, 0, *[0] * 17, 4])
    oracle = known([-2, -1, *[-0.5] * 17, 0], loss)
    asked: list[float] = []
    counted = replace(oracle, may_go_on=lambda passes: asked.append(passes) or True)  # type: ignore[func-returns-value]
    counted = replace(counted, passes_to_try=0.5)
    assert guided_set(counted, frozenset({0, 1}), frozenset(range(20)), Units(20))[0] == {0, 19}
    # Where nothing helps it ends, having tried some eight at a time.
    none, tries = replace(counted, losses=lambda sets, _: [0.0] * len(sets)), len(asked)
    assert guided_set(none, frozenset({0, 1}), frozenset(range(20)), Units(20))[0] == {0, 1}
    assert asked[tries:].count(3.0) == 2
    assert 3 < asked[tries:].count(0.5) < 7
    # Not where passes do not reach for it.
    short = replace(counted, may_go_on=lambda passes: passes > 1)
    assert guided_set(short, frozenset({0, 1}), frozenset(range(20)), Units(20))[0] == {0, 1}


def test_tries_are_filled_where_one_layer_is_kept() -> None:
    swaps = promising_swaps(frozenset({0}), [0.0] * 9, frozenset(range(9)))
    assert mixed(frozenset({0}), swaps) == swaps == [{layer} for layer in range(1, 9)]


def test_gates_are_pulled_back_from_the_set() -> None:
    assert gates_around(frozenset({1}), Units(3), 0) == ((0.25,), (0.75,), (0.25,))


@pytest.mark.parametrize("keep", [5, 9, 18])
def test_the_default_takes_no_more_than_three_fifths_of_naive_at_36_layers(keep: int) -> None:
    mask, spans = Mask(2048), TokenSpans(2048, 16383, 16420, 16384)
    naive = 64 * 37 * 36
    passes = {
        effort: CalibrationTask(selectors_of(BEST, effort), keep).cost(
            [spans] * 64, mask, Units(36)
        )
        for effort in EFFORTS
    }
    assert passes["low"] < passes["normal"] <= 0.6 * naive < passes["high"]


@pytest.mark.parametrize(
    ("units", "keep", "searches"),
    [
        (Units(8), 2, True),
        (Units(10), 2, True),
        (Units(10), 3, False),
        (Units(12), 3, False),
        (Units(36), 9, False),
        # KV heads, and orders for any number of layers, are found by gradients alone.
        (Units(4, 2), 2, False),
        (Units(8), 8, False),
    ],
)
def test_it_costs_no_more_than_measuring_every_layer(
    units: Units, keep: int, *, searches: bool
) -> None:
    mask, spans = Mask(16), TokenSpans(16, 239, 243, 240)
    search, passes = SEARCH.cost(spans, mask, units, keep), 14.0 * units.layers
    assert GUIDED.cost(spans, mask, units, keep) == (search if searches else passes)


def test_passes_are_of_the_whole_model_where_a_plan_is_about_some_layers() -> None:
    """With three recurrent layers to each full one, as Qwen3.5 has."""
    kinds = (*(LINEAR,) * 3, FULL) * 16
    spans, mask = TokenSpans(2048, 16383, 16420, 16384, kinds), Mask(2048)
    assert GUIDED.cost(spans, mask, Units(16), 4) == 14 * 64
    task = CalibrationTask((GUIDED, GUIDED), 4, contest_passes=2)
    assert task.cost([spans] * 3, mask, Units(16)) == 3 * (14 + 14 + 2) * 64


@pytest.mark.usefixtures("one_thread")
def test_on_a_model_it_is_no_worse_than_its_start_and_keeps_to_its_passes(tmp_path: Path) -> None:
    settings = Settings(window=48, length=200, samples=6, method="guided")
    where = RunContext(tmp_path, False, silent, lambda _: None, lambda _: None)
    run = calibration_run(open_source(str(DEMO)), settings, where, comparing=False)
    spent, choices = [], []
    searched = [replace(GUIDED, passes=20), SEARCH]
    tried = [(replace(GUIDED, passes=passes), keep) for passes, keep in ((3, 2), (14, 2), (20, 8))]
    with open_evaluator(run, run.examples.scored, "scored") as evaluator:
        for selector, keep in [*tried, *((one, 2) for one in searched)]:
            with evaluator.tallying(selector.name, 1.0, silent) as tally:
                choice = selector.choose(evaluator, keep)
                cost, kept = tally.layer_forwards, frozenset(choice.order[:2])
                spent.append((cost, evaluator.losses([kept])[0]))
            choices.append(choice)
            assert sorted(choice.order) == list(range(8))
            assert len(choice.examples) == 6
    start, some, nested, every, search = spent
    assert start[1] >= some[1] >= every[1]
    # Six examples are not thinned out: a step may take more than it does of many.
    assert start[0] < some[0] < (14 + 6) * 8 * 6
    assert nested[0] < (20 + 6) * 8 * 6
    # Of so few layers 20 passes measure every one.
    assert (choices[-2], every) == (choices[-1], search)
