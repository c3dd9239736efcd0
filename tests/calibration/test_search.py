"""Searches on true losses, held against exhaustive search and against patient greedy search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import comb, nan
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.calibration.search.beam import beam
from converter.calibration.search.evolution import evolve
from converter.calibration.search.greedy import GreedyOrder, greedy_add
from converter.calibration.search.nested import smallest_within
from converter.calibration.search.oracle import Losses, measure
from converter.calibration.search.swap import refine
from tests.oracles import (
    Loss,
    Oracle,
    additive,
    arbitrary,
    covering,
    lookups,
    optimum,
    patient_greedy,
    subsets,
)

whole_numbers = st.lists(st.integers(0, 5), min_size=1, max_size=12)
seeds = st.integers(0, 10_000)


def add_all(loss: Loss, total: int) -> GreedyOrder:
    return greedy_add(Oracle(loss), total, total)


def test_a_loss_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[1, 3\] is not a number"):
        measure(lambda sets: [nan for _ in sets], [frozenset({3, 1})])
    with pytest.raises(ValueError, match="zip"):
        measure(lambda _: [], [frozenset()])


# Greedy


@given(whole_numbers)
def test_layers_that_act_alone_are_ordered_by_their_gain(gains: list[int]) -> None:
    total = len(gains)
    expected = tuple(sorted(range(total), key=lambda layer: (-gains[layer], layer)))
    assert add_all(additive(gains), total).order == expected


@given(seeds, st.integers(1, 8), st.sampled_from([3, 1_000_000]))
def test_greedy_is_the_patient_one_where_all_layers_fit_the_margin(
    seed: int, total: int, values: int
) -> None:
    loss = arbitrary(seed, values)
    result = add_all(loss, total)
    assert result.order == patient_greedy(loss, total)
    assert result.losses == tuple(loss(result.first(count)) for count in range(total + 1))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("total", [24, 36])
def test_on_substitutes_lazy_greedy_is_the_patient_one_for_less(seed: int, total: int) -> None:
    loss, oracle = covering(total, seed), Oracle(covering(total, seed))
    result = greedy_add(oracle, total, total)
    assert result.order == patient_greedy(loss, total)
    assert len(oracle.known) < 0.7 * total * (total + 1) / 2
    assert sum(result.measured) == len(oracle.known) - 1


def test_a_crowd_of_substitutes_is_seen_through() -> None:
    total, crowd = 36, frozenset(range(30))

    def loss(layers: frozenset[int]) -> float:
        return -10.0 * bool(layers & crowd) - sum(layers - crowd) / 36

    oracle = Oracle(loss)
    result = greedy_add(oracle, total, 3)
    # Old gains of 10 nats stand before those below a nat until all 29 are measured again, the last
    # three with layer 35.
    assert result.order[:3] == patient_greedy(loss, total)[:3] == (0, 35, 34)
    assert result.measured == (36, 29 + 1, 18)


def test_lazy_greedy_stays_close_to_the_patient_one_on_complements() -> None:
    behind, asked, upto = [], [], 9
    for seed in range(24):
        loss, oracle = lookups(36, seed), Oracle(lookups(36, seed))
        result = greedy_add(oracle, 36, upto)
        behind.append(loss(result.first(upto)) - loss(frozenset(patient_greedy(loss, 36)[:upto])))
        asked.append(len(oracle.known))
        # One call a step, but for a few overtaken ones and the last losses.
        assert len(oracle.calls) <= 2 * upto + 1
    # The bare queue ends half a nat behind.
    assert fmean(behind) < 0.1
    assert max(asked) < 190 < sum(36 - step for step in range(upto))


def test_a_layer_that_starts_to_matter_is_seen_within_three_steps() -> None:
    total, key, partner = 36, 0, 35

    def loss(layers: frozenset[int]) -> float:
        # The partner alone does harm, so that it waits at the end of the queue.
        own = sum(10 - 0.1 * layer for layer in layers - {partner})
        return -own - (100 if {key, partner} <= layers else -1 if partner in layers else 0)

    assert patient_greedy(loss, total)[:2] == (key, partner)
    assert add_all(loss, total).order.index(partner) <= 3


@given(seeds)
def test_nothing_is_measured_past_the_count_asked_for(seed: int) -> None:
    total, count = 10, 3
    loss = arbitrary(seed)
    oracle = Oracle(loss)
    result = greedy_add(oracle, total, count)
    known = range(count + 1)
    assert sorted(result.order) == list(range(total))
    assert [i for i, x in enumerate(result.losses) if x is not None] == list(known)
    for size in known:
        assert result.losses[size] == loss(result.first(size))
    assert {len(layers) for layers in oracle.known} <= set(known)
    assert len(result.measured) == count


def test_the_rest_follows_by_what_is_known() -> None:
    added = greedy_add(Oracle(additive([1, 5, 2, 4, 2, 6])), 6, 2)
    assert added.order == (5, 1, 3, 2, 4, 0)
    assert added.losses == (20, 14, 9, None, None, None, None)


def test_greedy_without_a_step_measures_where_it_starts() -> None:
    result = greedy_add(Oracle(additive([1, 2])), 2, 0)
    assert (result.order, result.losses, result.measured) == ((0, 1), (3, None, None), ())


# Beam


@given(seeds, st.integers(1, 7), st.sampled_from([3, 1_000_000]))
def test_a_beam_wide_enough_finds_the_best_set_of_every_count(
    seed: int, total: int, values: int
) -> None:
    loss = arbitrary(seed, values)
    found = beam(Oracle(loss), total, total, width=comb(total, total // 2))
    for count, best in enumerate(found):
        assert best.layers == optimum(loss, total, count)
        assert best.loss == loss(best.layers)
    assert len(found) == total + 1


def test_a_beam_of_one_is_greedy() -> None:
    loss = arbitrary(3)
    sets = [best.layers for best in beam(Oracle(loss), 8, 8, width=1)]
    assert sets == [frozenset(patient_greedy(loss, 8)[:count]) for count in range(9)]


def test_a_beam_outlives_an_early_mistake() -> None:
    def loss(layers: frozenset[int]) -> float:
        # The best single layer is a poor half of a pair.
        return 10.0 - 3 * (0 in layers) - 2 * (len(layers & {1, 2}) > 0) - 6 * ({1, 2} <= layers)

    assert 0 in greedy_add(Oracle(loss), 6, 2).first(2)
    assert beam(Oracle(loss), 6, 2, width=2)[2].layers == {1, 2} == optimum(loss, 6, 2)


@given(st.lists(st.integers(0, 50), min_size=20, max_size=36, unique=True))
def test_a_beam_ranks_layers_that_act_alone(gains: list[int]) -> None:
    loss, total = additive(gains), len(gains)
    ranking = sorted(range(total), key=lambda layer: -gains[layer])
    found = beam(Oracle(loss), total, 10, width=2)
    assert [best.layers for best in found] == [frozenset(ranking[:k]) for k in range(11)]


def test_a_beam_measures_far_less_than_all_sets() -> None:
    oracle = Oracle(lookups(36, 1))
    found = beam(oracle, 36, 9, width=4)
    assert [len(best.layers) for best in found] == list(range(10))
    # Of each of four members at most two quarters of its layers a step, in one call.
    assert len(oracle.known) <= 37 + 4 * sum(2 * -(-left // 4) for left in range(28, 36))
    assert len([call for call in oracle.calls if call]) == 9


# Swaps


@given(whole_numbers, st.data())
def test_swaps_of_layers_that_act_alone_end_at_the_optimum(
    gains: list[int], data: st.DataObject
) -> None:
    total, loss = len(gains), additive(gains)
    layers = data.draw(st.frozensets(st.integers(0, total - 1)))
    result = refine(Oracle(loss), layers, total)
    assert result.settled
    assert result.best.loss == loss(result.best.layers) == loss(optimum(loss, total, len(layers)))
    assert [swap.predicted for swap in result.swaps] == [swap.loss for swap in result.swaps]


@given(seeds, st.integers(1, 8), st.data())
def test_swaps_end_where_no_swap_is_better(seed: int, total: int, data: st.DataObject) -> None:
    loss = arbitrary(seed)
    layers = data.draw(st.frozensets(st.integers(0, total - 1)))
    result = refine(Oracle(loss), layers, total, tries=total**2, rounds=100)
    assert result.start.layers == layers
    assert result.settled
    best = result.best
    near = [s for s in subsets(total, len(layers)) if len(s - best.layers) == 1]
    assert all(loss(other) >= best.loss == loss(best.layers) for other in near)
    # The path told is the path taken, and it falls.
    now = layers
    for swap in result.swaps:
        assert swap.out in now
        assert swap.into not in now
        now = now - {swap.out} | {swap.into}
        assert swap.loss == loss(now)
    assert now == best.layers
    fallen = [result.start.loss, *(swap.loss for swap in result.swaps)]
    assert all(after < before for before, after in pairwise(fallen))


def test_swaps_measure_single_switches_and_the_few_most_promising() -> None:
    oracle = Oracle(lookups(36, 5))
    result = refine(oracle, frozenset(range(9)), 36, tries=8, rounds=3)
    assert len(result.swaps) == 3
    assert not result.settled
    # The start, then one call for the switches and one for the swaps of a round.
    assert [len(call) <= 37 for call in oracle.calls] == [True] * len(oracle.calls)
    assert len(oracle.known) <= 1 + 3 * (36 + 8)


def test_of_equal_swaps_the_one_for_lower_layers_is_made() -> None:
    result = refine(Oracle(additive([0, 2, 2, 0, 0])), frozenset({3, 4}), 5)
    # All four first swaps are worth the same; {1, 3} comes before {1, 4}, {2, 3} and {2, 4}.
    assert [(swap.out, swap.into) for swap in result.swaps] == [(4, 1), (3, 2)]


@pytest.mark.parametrize("layers", [frozenset(), frozenset(range(4))])
def test_a_set_without_swaps_is_only_measured(layers: frozenset[int]) -> None:
    oracle = Oracle(additive([1, 2, 3, 4]))
    result = refine(oracle, layers, 4)
    assert (result.start, result.swaps, result.settled) == (result.best, (), True)
    assert set(oracle.known) == {layers}


# Evolution


def by_example(losses: Sequence[Loss]) -> tuple[Callable[..., list[float]], dict[int, int]]:
    """An oracle over the first examples, and how many sets it was asked for, by their number."""
    asked: dict[int, int] = {}

    def partial(sets: Sequence[frozenset[int]], examples: int) -> list[float]:
        asked[examples] = asked.get(examples, 0) + len(sets)
        return [fmean(loss(layers) for loss in losses[:examples]) for layers in sets]

    return partial, asked


def alike(common: Loss, own: Loss) -> Loss:
    """An example that is mostly like all others."""
    return lambda layers: common(layers) + 0.2 * own(layers)


@pytest.mark.parametrize("seed", range(4))
def test_evolution_finds_the_optimum_with_few_sets_on_all_examples(seed: int) -> None:
    examples = [alike(lookups(16, seed), lookups(16, 100 * seed + i)) for i in range(32)]
    losses, asked = by_example(examples)
    result = evolve(losses, [frozenset(range(4))], 16, examples=32, generations=40, seed=seed)

    def loss(layers: frozenset[int]) -> float:
        return fmean(one(layers) for one in examples)

    assert result.best.loss == pytest.approx(loss(optimum(loss, 16, 4)))
    # A generation is 32 sets on 2 examples, 8 on 8 and 2 on 32, and there are 1820 sets in all.
    assert asked == {2: 32 * 40, 8: 8 * 40, 32: 1 + 2 * 40}
    losses_on_the_way = [best.loss for best in result.trace]
    assert losses_on_the_way == sorted(losses_on_the_way, reverse=True)
    assert {len(best.layers) for best in result.trace} == {4}


def test_evolution_is_the_same_for_a_seed_and_starts_from_the_best() -> None:
    losses, _ = by_example([lookups(20, i) for i in range(8)])
    starts = [frozenset(range(5)), frozenset(range(5, 10)), frozenset(range(10, 15))]

    def run(seed: int) -> list[frozenset[int]]:
        result = evolve(losses, starts, 20, examples=8, generations=6, offspring=8, seed=seed)
        return [best.layers for best in result.trace]

    assert run(1) == run(1) != run(2)
    assert run(1)[0] == min(starts, key=lambda layers: losses([layers], 8)[0])


def test_evolution_ends_when_there_is_nothing_left_to_draw() -> None:
    losses, _ = by_example([additive([1, 2, 3])])
    for layers in (frozenset[int](), frozenset(range(3))):
        result = evolve(losses, [layers], 3, examples=1, generations=5)
        assert [best.layers for best in result.trace] == [layers]
    result = evolve(losses, [frozenset({0})], 3, examples=1, generations=50)
    assert result.best.layers == {2}
    assert len(result.trace) < 50


def test_evolution_wants_starts_of_one_size() -> None:
    losses, _ = by_example([additive([1, 2, 3])])
    for starts in ([], [frozenset({1}), frozenset({1, 2})]):
        with pytest.raises(ValueError, match="one size"):
            evolve(losses, starts, 3, examples=1, generations=1)


# The smallest prefix within a bound


@given(st.lists(st.integers(0, 50), min_size=1, max_size=36), st.integers(0, 60))
def test_where_losses_fall_the_smallest_prefix_is_found(gains: list[int], bound: int) -> None:
    total, loss = len(gains), additive(gains)
    order = sorted(range(total), key=lambda layer: -layer)
    oracle = Oracle(loss)
    result = smallest_within(oracle, order, bound)
    prefixes = [frozenset(order[:count]) for count in range(total + 1)]
    assert result.found.layers == next(layers for layers in prefixes if loss(layers) <= bound)
    assert result.full.layers == frozenset(order)
    assert len(oracle.known) <= 2 + (total - 1).bit_length()
    assert {one.layers: one.loss for one in result.measured} == oracle.known


@given(seeds, st.integers(1, 36), st.floats(0, 1_000_000))
def test_whatever_losses_do_the_prefix_is_within_and_one_shorter_is_not(
    seed: int, total: int, bound: float
) -> None:
    loss, order = arbitrary(seed), tuple(range(total))
    result = smallest_within(Oracle(loss), order, bound)
    limit = loss(frozenset(order)) + bound
    count = len(result.found.layers)
    assert result.found.layers == frozenset(order[:count])
    assert result.found.loss == loss(result.found.layers) <= limit
    shorter = {len(one.layers): one.loss for one in result.measured}.get(count - 1)
    assert count == 0 or (shorter is not None and shorter > limit)


@pytest.mark.parametrize("bound", [-0.1, nan])
def test_a_bound_that_nothing_meets_is_refused(bound: float) -> None:
    with pytest.raises(ValueError, match="bound"):
        smallest_within(Oracle(additive([1])), (0,), bound)


@pytest.mark.parametrize("total", [1, 2, 36])
def test_every_search_is_the_same_twice_and_copes_with_any_depth(total: int) -> None:
    def run(oracle: Losses) -> list[object]:
        half = frozenset(range(total // 2))
        return [
            greedy_add(oracle, total, total),
            beam(oracle, total, total, width=3),
            refine(oracle, half, total),
            evolve(lambda sets, _: oracle(sets), [half], total, examples=4, generations=3),
        ]

    loss = lookups(total, 11)
    assert run(Oracle(loss)) == run(Oracle(loss))
