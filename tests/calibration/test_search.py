"""Searches on true losses, held against exhaustive search and against patient greedy search."""

from __future__ import annotations

from math import nan
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.calibration.selectors.search import (
    greedy_order,
    measure,
    refine,
    smallest_within,
)
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

seeds = st.integers(0, 10_000)


def add_all(loss: Loss, total: int) -> tuple[int, ...]:
    return greedy_order(Oracle(loss), total, total)


def test_what_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[1, 3\] is not a number"):
        measure(lambda sets: [nan for _ in sets], [frozenset({3, 1})])
    with pytest.raises(ValueError, match="zip"):
        measure(lambda _: [], [frozenset()])
    for bound in (-0.1, nan):
        with pytest.raises(ValueError, match="bound"):
            smallest_within(Oracle(additive([1])), (0,), bound)


# Greedy


@given(
    st.builds(arbitrary, seeds, st.sampled_from([3, 1_000_000]))
    | st.builds(additive, st.lists(st.integers(0, 5), min_size=8, max_size=8)),
    st.integers(1, 8),
)
def test_greedy_is_the_patient_one_where_all_layers_fit_the_margin(loss: Loss, total: int) -> None:
    assert add_all(loss, total) == patient_greedy(loss, total)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("total", [24, 36])
def test_on_substitutes_lazy_greedy_is_the_patient_one_for_less(seed: int, total: int) -> None:
    loss, oracle = covering(total, seed), Oracle(covering(total, seed))
    assert greedy_order(oracle, total, total) == patient_greedy(loss, total)
    assert len(oracle.known) < 0.7 * total * (total + 1) / 2


def test_a_crowd_of_substitutes_is_seen_through() -> None:
    total, crowd = 36, frozenset(range(30))

    def loss(layers: frozenset[int]) -> float:
        return -10.0 * bool(layers & crowd) - sum(layers - crowd) / 36

    oracle = Oracle(loss)
    order = greedy_order(oracle, total, 3)
    # Old gains of 10 nats stand before those below a nat until all 29 are measured again, the last
    # three with layer 35.
    assert order[:3] == patient_greedy(loss, total)[:3] == (0, 35, 34)
    by_size = [sum(len(layers) == size for layers in oracle.known) for size in range(4)]
    assert by_size == [1, 36, 29 + 1, 18]


def test_lazy_greedy_stays_close_to_the_patient_one_on_complements() -> None:
    behind, asked, upto = [], [], 9
    for seed in range(24):
        loss, oracle = lookups(36, seed), Oracle(lookups(36, seed))
        orders = greedy_order(oracle, 36, upto), patient_greedy(loss, 36)
        quick, patient = (loss(frozenset(order[:upto])) for order in orders)
        behind.append(quick - patient)
        asked.append(len(oracle.known))
        # One call a step, but for a few overtaken ones.
        assert len(oracle.calls) <= 2 * upto
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
    assert add_all(loss, total).index(partner) <= 3


@given(seeds)
def test_nothing_is_measured_past_the_count_asked_for(seed: int) -> None:
    total, count, oracle = 10, 3, Oracle(arbitrary(seed))
    order = greedy_order(oracle, total, count)
    assert sorted(order) == list(range(total))
    assert {len(layers) for layers in oracle.known} <= set(range(count + 1))
    assert all(frozenset(order[:size]) in oracle.known for size in range(count + 1))


def test_the_rest_follows_by_what_is_known() -> None:
    assert greedy_order(Oracle(additive([1, 5, 2, 4, 2, 6])), 6, 2) == (5, 1, 3, 2, 4, 0)
    assert greedy_order(Oracle(additive([1, 2])), 2, 0) == (0, 1)


# Swaps


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.data())
def test_swaps_of_layers_that_act_alone_end_at_the_optimum(
    gains: list[int], data: st.DataObject
) -> None:
    total, loss = len(gains), additive(gains)
    layers = data.draw(st.frozensets(st.integers(0, total - 1)))
    result = refine(Oracle(loss), layers, total)
    assert result.loss == loss(result.layers) == loss(optimum(loss, total, len(layers)))


@given(seeds, st.integers(1, 8), st.data())
def test_swaps_end_where_no_swap_is_better(seed: int, total: int, data: st.DataObject) -> None:
    loss = arbitrary(seed)
    layers = data.draw(st.frozensets(st.integers(0, total - 1)))
    result = refine(Oracle(loss), layers, total, tries=total**2, rounds=100)
    near = [s for s in subsets(total, len(layers)) if len(s - result.layers) == 1]
    assert all(loss(other) >= result.loss == loss(result.layers) for other in near)
    assert len(result.layers) == len(layers)
    assert result.loss <= loss(layers)


def test_swaps_measure_single_switches_and_the_few_most_promising() -> None:
    oracle = Oracle(lookups(36, 5))
    start = frozenset(range(9))
    result = refine(oracle, start, 36, tries=8, rounds=3)
    # Three swaps were made, and a fourth would help.
    assert len(result.layers - start) == 3
    assert refine(oracle, start, 36, tries=8, rounds=4).loss < result.loss
    assert [len(call) <= 37 for call in oracle.calls] == [True] * len(oracle.calls)
    # The start, then one call for the switches and one for the swaps of a round.
    assert len(oracle.known) <= 1 + 4 * (36 + 8)


def test_of_equal_swaps_the_one_for_lower_layers_is_made() -> None:
    loss = additive([0, 2, 2, 0, 0])
    # All four first swaps are worth the same; {1, 3} comes before {1, 4}, {2, 3} and {2, 4}.
    assert refine(Oracle(loss), frozenset({3, 4}), 5, rounds=1).layers == {1, 3}
    assert refine(Oracle(loss), frozenset({3, 4}), 5).layers == {1, 2}


def test_a_set_without_swaps_is_only_measured() -> None:
    for layers in (frozenset[int](), frozenset(range(4))):
        oracle = Oracle(additive([1, 2, 3, 4]))
        assert refine(oracle, layers, 4).layers == layers
        assert set(oracle.known) == {layers}


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


@pytest.mark.parametrize("total", [1, 2, 36])
def test_every_search_is_the_same_twice_and_copes_with_any_depth(total: int) -> None:
    half = frozenset(range(total // 2))
    first, second = (
        [
            greedy_order(oracle, total, total),
            refine(oracle, half, total),
            smallest_within(oracle, range(total), 0.5),
        ]
        for oracle in (Oracle(lookups(total, 11)), Oracle(lookups(total, 11)))
    )
    assert first == second
