"""How far rankings can be trusted: resampling, held against cases that are known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converter.calibration.reliability import inclusion, spearman, split_half
from converter.calibration.scores import ExampleScores, Race, Scores, means, rank
from converter.model.mask import Mask

Row = Sequence[float | None]


def scores_of(*rows: Row, race: Race | None = None) -> Scores:
    examples = tuple(ExampleScores("pair", 100, 4, 1.0, 3.0, tuple(row)) for row in rows)
    order = rank(means(examples))
    if race is not None:
        order = tuple(sorted(order, key=race.place))
    return Scores("nll-restore", Mask(16), examples, 1.0, {}, order, race)


def test_one_example_always_chooses_the_same() -> None:
    found = inclusion(scores_of([0.1, 3.0, 2.0, 0.0]), 2)
    assert (found.keep, found.by_layer, found.same_set) == (2, (0.0, 1.0, 1.0, 0.0), 1.0)


def test_what_every_example_agrees_on_is_always_chosen() -> None:
    found = inclusion(scores_of([3.0, 1.0, 2.0], [30.0, 1.0, 20.0], [3.0, -1.0, 2.0]), 1)
    assert (found.by_layer, found.same_set) == ((1.0, 0.0, 0.0), 1.0)


def test_two_examples_that_disagree_are_a_coin() -> None:
    """Of two drawn from two: both the first, 1/4; both the second, 1/4; one of each, 1/2."""
    found = inclusion(scores_of([1.0, 0.0], [0.0, 0.9]), 1)
    # Layer 1 wins only where the second example is drawn twice.
    assert found.by_layer[1] == pytest.approx(0.25, abs=0.03)
    assert found.same_set == found.by_layer[0] == 1 - found.by_layer[1]


def test_inclusion_is_the_share_of_all_resamples() -> None:
    """Three examples, so 27 resamples: all are written down."""
    rows = [[1.0, 0.9, 0.2], [0.1, 0.5, 0.6], [0.3, 0.0, 0.35]]
    counts, same = [0, 0, 0], 0
    means = [math.fsum(column) for column in zip(*rows, strict=True)]
    chosen = set(sorted(range(3), key=lambda i: -means[i])[:2])
    for drawn in itertools.product(rows, repeat=3):
        sums = [math.fsum(column) for column in zip(*drawn, strict=True)]
        best = sorted(range(3), key=lambda i: (-sums[i], i))[:2]
        same += set(best) == chosen
        for layer in best:
            counts[layer] += 1
    found = inclusion(scores_of(*rows), 2)
    assert found.by_layer == pytest.approx([count / 27 for count in counts], abs=0.04)
    assert found.same_set == pytest.approx(same / 27, abs=0.04)
    assert inclusion(scores_of(*rows), 2) == found, "the seed is fixed"


@given(
    st.integers(1, 4).flatmap(
        lambda layers: st.lists(
            st.lists(st.floats(-5, 5), min_size=layers, max_size=layers), min_size=1, max_size=5
        )
    ),
    st.integers(0, 4),
)
@settings(max_examples=15)
def test_as_many_layers_are_chosen_as_are_kept(rows: list[list[float]], keep: int) -> None:
    keep = min(keep, len(rows[0]))
    found = inclusion(scores_of(*rows), keep)
    assert sum(found.by_layer) == pytest.approx(keep)
    assert all(0 <= share <= 1 for share in found.by_layer)
    assert 0 <= found.same_set <= 1


def test_layers_scored_on_few_examples_are_judged_by_those() -> None:
    """As a race leaves them: layer 2 was rejected after the first of four examples."""
    rows: list[Row] = [[1.0, 0.5, 0.1], [1.0, 0.5, None], [1.0, 0.5, None], [1.0, 0.5, None]]
    found = inclusion(scores_of(*rows, race=Race(1, rejected=(2,))), 1)
    assert found.by_layer == (1.0, 0.0, 0.0)


def test_a_screened_layer_counts_by_its_own_scores() -> None:
    found = inclusion(scores_of([2.0, None], [2.0, 1.0], [2.0, None]), 1)
    assert found.by_layer == (1.0, 0.0)


def test_halves_that_agree_and_halves_that_do_not() -> None:
    assert split_half(scores_of(*[[3.0, 2.0, 1.0]] * 4)) == 1.0
    # Whatever the halves, two examples of each kind cancel or oppose each other.
    opposed = [[1.0, 2.0, 3.0]] * 2 + [[3.0, 2.0, 1.0]] * 2
    found = split_half(scores_of(*opposed))
    # Of the six halvings, one third are two against two: -1; the others are all ties: 0.
    assert found == pytest.approx(-1 / 3, abs=0.1)


def test_too_few_examples_have_no_halves() -> None:
    assert split_half(scores_of(*[[1.0, 2.0]] * 3)) is None
    assert split_half(scores_of(*[[1.0, 2.0]] * 3, [1.0, None])) is None
    assert split_half(scores_of(*[[2.0, 1.0]] * 4, [None, 9.0])) == pytest.approx(1.0)


def test_rank_correlation() -> None:
    assert spearman([1.0, 2.0, 3.0], [10.0, 20.0, 30.0]) == pytest.approx(1.0)
    assert spearman([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1.0)
    # The textbook's 1 - 6 sum(d^2) / n(n^2 - 1).
    assert spearman([1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 4.0, 3.0]) == pytest.approx(1 - 6 * 4 / 60)
    assert spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) == 0.0
