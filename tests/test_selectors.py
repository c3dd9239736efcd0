"""Selectors: what they switch, how they score and rank, and evenly spaced plans."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.errors import PlanError
from converter.mask import FULL, SLIDING
from converter.selectors import (
    MEASURED,
    METHODS,
    PERIODIC,
    periodic_layers,
    periodic_offsets,
    rank,
)

FINITE = st.floats(-1e6, 1e6)
TOTALS_AND_COUNTS = st.integers(1, 120).flatmap(
    lambda total: st.tuples(st.just(total), st.integers(1, total))
)


def test_methods_are_the_measured_ones_and_the_periodic_one() -> None:
    assert (*MEASURED, PERIODIC) == METHODS
    assert all(selector.name == name and selector.summary for name, selector in MEASURED.items())


@pytest.mark.parametrize("layer", range(5))
def test_a_variant_switches_one_layer(layer: int) -> None:
    restore, remove = MEASURED["nll-restore"], MEASURED["nll-remove"]
    assert (restore.others, remove.others) == (SLIDING, FULL)
    assert set(restore.variant(layer, 5)) == {layer}
    assert set(remove.variant(layer, 5)) == {0, 1, 2, 3, 4} - {layer}


@given(FINITE, FINITE)
def test_a_layer_that_matters_scores_above_zero(uniform: float, switched: float) -> None:
    """Restoring it lowers the loss of a sliding model; removing it raises that of a full one."""
    assert MEASURED["nll-restore"].score(uniform, switched) == uniform - switched
    assert MEASURED["nll-remove"].score(uniform, switched) == switched - uniform


@given(st.lists(FINITE, max_size=40))
def test_a_ranking_is_an_order_by_descending_score(scores: list[float]) -> None:
    order = rank(scores)
    assert sorted(order) == list(range(len(scores)))
    assert [scores[i] for i in order] == sorted(scores, reverse=True)


@given(st.lists(st.sampled_from([0.0, -0.0, 1.0]), max_size=12))
def test_equal_scores_keep_the_order_of_the_layers(scores: list[float]) -> None:
    order = rank(scores)
    for first, second in pairwise(order):
        assert scores[first] > scores[second] or first < second


def test_known_rankings() -> None:
    assert rank([0.1, 0.5, 0.5, -1.0]) == (1, 2, 0, 3)
    assert rank([]) == ()


@given(TOTALS_AND_COUNTS)
def test_periodic_plans_are_distinct_in_range_and_evenly_spaced(pair: tuple[int, int]) -> None:
    total, count = pair
    plans = [periodic_layers(total, count, i) for i in range(periodic_offsets(total, count))]
    assert len(set(plans)) == len(plans) >= 1
    for offset, plan in enumerate(plans):
        assert plan[0] == offset
        assert len(set(plan)) == count
        assert all(0 <= layer < total for layer in plan)
        gaps = [b - a for a, b in pairwise(plan)]
        assert all(gap in (total // count, -(-total // count)) for gap in gaps)


@given(TOTALS_AND_COUNTS)
def test_no_further_offset_fits(pair: tuple[int, int]) -> None:
    total, count = pair
    offsets = periodic_offsets(total, count)
    assert periodic_layers(total, count, offsets - 1)[-1] == total - 1
    for offset in (offsets, -1):
        with pytest.raises(PlanError, match="out of range") as caught:
            periodic_layers(total, count, offset)
        assert caught.value.details["expected"] == f"0 to {offsets - 1}"


def test_every_layer_is_kept_by_some_offset_when_the_period_divides_the_depth() -> None:
    plans = [periodic_layers(12, 3, offset) for offset in range(periodic_offsets(12, 3))]
    assert plans == [(0, 4, 8), (1, 5, 9), (2, 6, 10), (3, 7, 11)]


def test_a_periodic_plan_of_no_layers_has_one_offset() -> None:
    assert periodic_offsets(12, 0) == 1
    assert periodic_layers(12, 0, 0) == ()
