"""How far rankings can be trusted: resampling and comparing, held against cases that are known."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import spearmanr
from scipy.stats import t as student

from converter.calibration.diagnostics import (
    Agreement,
    Inclusion,
    KindRanking,
    PairAgreement,
    agreement,
    correlation_interval,
    inclusion,
    split_half,
)
from converter.calibration.scores import ExampleScores, Race, Scores, means, rank
from converter.cli.console import Console
from converter.cli.score_tables import show_agreement
from converter.common.statistics import rank_correlations, spearman, t_tail
from converter.model.mask import Mask

Row = Sequence[float | None]


def of_kind(kind: str, rows: Sequence[Row] | NDArray[np.float64]) -> list[ExampleScores]:
    return [ExampleScores(kind, 100, 4, 1.0, 3.0, tuple(row)) for row in rows]


def scores_of(*rows: Row, race: Race | None = None) -> Scores:
    examples = tuple(of_kind("pair", rows))
    order = rank(means(examples))
    if race is not None:
        order = tuple(sorted(order, key=race.place))
    return Scores("nll-restore", Mask(16), examples, 1.0, {}, order, race)


def test_what_every_example_agrees_on_is_always_chosen() -> None:
    found = inclusion(scores_of([0.1, 3.0, 2.0, 0.0]), 2)
    assert found == Inclusion(2, (0.0, 1.0, 1.0, 0.0), 1.0)
    found = inclusion(scores_of([3.0, 1.0, 2.0], [30.0, 1.0, 20.0], [3.0, -1.0, 2.0]), 1)
    assert found == Inclusion(1, (1.0, 0.0, 0.0), 1.0)


def test_two_examples_that_disagree_are_a_coin() -> None:
    """Of two drawn from two: both the first, 1/4; both the second, 1/4; one of each, 1/2."""
    found = inclusion(scores_of([1.0, 0.0], [0.0, 0.9]), 1)
    # Layer 1 wins only where the second example is drawn twice.
    assert found.by_layer[1] == pytest.approx(0.25, abs=0.03)
    assert found.same_set == found.by_layer[0] == 1 - found.by_layer[1]


def test_inclusion_is_the_share_of_all_resamples() -> None:
    """Three examples, so 27 resamples: all are written down."""
    rows = [[1.0, 0.9, 0.2], [0.1, 0.5, 0.6], [0.3, 0.0, 0.35]]

    def best(drawn: Sequence[Sequence[float]]) -> set[int]:
        sums = [math.fsum(column) for column in zip(*drawn, strict=True)]
        return set(sorted(range(3), key=lambda i: (-sums[i], i))[:2])

    every = [best(drawn) for drawn in itertools.product(rows, repeat=3)]
    found = inclusion(scores_of(*rows), 2)
    chosen = [sum(layer in layers for layers in every) / 27 for layer in range(3)]
    assert found.by_layer == pytest.approx(chosen, abs=0.04)
    assert found.same_set == pytest.approx(every.count(best(rows)) / 27, abs=0.04)
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


def halves(*rows: Row) -> float | None:
    return split_half(of_kind("pair", rows))


def test_halves_that_agree_and_halves_that_do_not() -> None:
    assert halves(*[[3.0, 2.0, 1.0]] * 4) == 1.0
    # Whatever the halves, two examples of each kind cancel or oppose each other.
    opposed = [[1.0, 2.0, 3.0]] * 2 + [[3.0, 2.0, 1.0]] * 2
    found = halves(*opposed)
    # Of the six halvings, one third are two against two: -1; the others are all ties: 0.
    assert found == pytest.approx(-1 / 3, abs=0.1)


def test_too_few_examples_have_no_halves() -> None:
    assert halves(*[[1.0, 2.0]] * 3) is None
    assert halves(*[[1.0, 2.0]] * 3, [1.0, None]) is None
    assert halves(*[[2.0, 1.0]] * 4, [None, 9.0]) == pytest.approx(1.0)


def test_rank_correlation() -> None:
    assert spearman([1.0, 2.0, 3.0], [10.0, 20.0, 30.0]) == pytest.approx(1.0)
    assert spearman([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1.0)
    # The textbook's 1 - 6 sum(d^2) / n(n^2 - 1).
    assert spearman([1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 4.0, 3.0]) == pytest.approx(1 - 6 * 4 / 60)
    assert spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) == 0.0


def only_pair(found: Agreement) -> PairAgreement:
    (pair,) = found.pairs
    return pair


def test_the_correlation_is_that_of_the_mean_scores() -> None:
    rng = np.random.default_rng(3)
    tables = {"chat": rng.normal(size=(6, 9)), "code": rng.normal(size=(11, 9))}
    # The order in which kinds come and mix does not matter to their own figures.
    examples = [e for kind, table in tables.items() for e in of_kind(kind, table)]
    mixed = [examples[i] for i in (0, *rng.permutation(np.arange(1, len(examples))))]
    expected = spearmanr(*(table.mean(axis=0) for table in tables.values())).statistic
    for given_examples in (examples, mixed):
        assert only_pair(agreement(given_examples)).correlation == pytest.approx(expected)
    assert agreement(examples).kinds == tuple(
        KindRanking(kind, len(table), halves(*table.tolist())) for kind, table in tables.items()
    )


def test_row_correlations_are_scipys() -> None:
    rng = np.random.default_rng(4)
    # Whole numbers, so that there are ties, and some rows do not vary at all.
    left, right = rng.integers(0, 4, size=(2, 200, 5)).astype(float)
    left[:3] = 1.0
    expected = [
        0.0 if 1 in (len(set(a)), len(set(b))) else spearmanr(a, b).statistic
        for a, b in zip(left.tolist(), right.tolist(), strict=True)
    ]
    assert rank_correlations(left, right).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("degrees", [1, 2, 15, 63, 4000])
def test_the_tail_of_students_t_is_scipys(degrees: int) -> None:
    for value in (-3.0, 0.0, 0.7, 2.5, 6.0, 40.0):
        assert t_tail(value, degrees) == pytest.approx(student.sf(value, degrees), rel=1e-12)


def test_an_interval_joins_percentiles_and_their_reflection() -> None:
    resampled = np.linspace(0.0, 0.8, 81).tolist()
    # 95% of an even spread from 0 to 0.8 lie from 0.02 to 0.78; about 0.5 that is 0.22 to 0.98.
    assert correlation_interval(0.5, resampled) == pytest.approx((0.02, 0.98))
    assert correlation_interval(0.3, resampled) == pytest.approx((-0.18, 0.78))
    assert correlation_interval(0.9, resampled) == pytest.approx((0.02, 1.0)), "never above 1"


def test_an_interval_is_that_of_all_resamples() -> None:
    """Three or four layers, four examples of each kind: all 256 x 256 pairs of resamples."""
    tables = (
        [[3.0, 1, 0, 2], [0, 3, 1, 1], [2, 0, 4, 1], [1, 2, 0, 3]],
        [[0.0, 1, 3, 2], [3, 0, 2, 1], [0, 2, 1, 5], [1, 0, 2, 2]],
    )
    left, right = (np.array(list(itertools.product(t, repeat=4))).mean(axis=1) for t in tables)
    every = rank_correlations(np.repeat(left, 256, axis=0), np.tile(right, (256, 1)))
    examples = [*of_kind("a", tables[0]), *of_kind("b", tables[1])]
    found = only_pair(agreement(examples))
    expected = correlation_interval(found.correlation, every.tolist())
    assert (found.low, found.high) == pytest.approx(expected, abs=0.1)
    assert only_pair(agreement(examples)) == found, "the seed is fixed"


@pytest.mark.parametrize(("sign", "verdict"), [(1.0, "agree"), (-1.0, "differ")])
def test_kinds_without_noise_are_certain(sign: float, verdict: str) -> None:
    up = np.arange(5.0)
    found = only_pair(agreement(of_kind("a", [up] * 4) + of_kind("b", [sign * up] * 5)))
    assert (found.kinds, found.verdict) == (("a", "b"), verdict)
    assert (found.correlation, found.low, found.high) == pytest.approx((sign,) * 3)


def test_every_two_kinds_are_compared_and_small_ones_left_out() -> None:
    rng = np.random.default_rng(5)
    sizes = {"a": 4, "b": 3, "c": 5, "d": 9}
    by_kind = (of_kind(kind, rng.normal(size=(count, 6))) for kind, count in sizes.items())
    found = agreement(list(itertools.chain(*by_kind)))
    assert [pair.kinds for pair in found.pairs] == [("a", "c"), ("a", "d"), ("c", "d")]
    assert found.kinds[1] == KindRanking("b", 3, None)
    alone = agreement(of_kind("a", rng.normal(size=(9, 6))))
    assert (len(alone.kinds), alone.pairs) == (1, ())
    assert "not two kinds" in alone.conclusion()


def test_layers_of_a_race_are_judged_by_the_examples_they_have() -> None:
    """Layer 3 was rejected after the first example of each kind, as a race does."""
    first, later = [4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, None]
    found = agreement(of_kind("a", [first, *[later] * 7]) + of_kind("b", [first, *[later] * 7]))
    pair = only_pair(found)
    assert (pair.correlation, pair.low, pair.high) == pytest.approx((1.0, 1.0, 1.0))
    # One complete example has no halves, so nothing is claimed.
    assert [kind.split_half for kind in found.kinds] == [None, None]
    assert pair.verdict == "open"
    assert found.conclusion() == (
        "a and b cannot be told to agree or to differ at this number of examples"
    )


def test_a_layer_that_one_kind_has_no_score_of_is_not_compared() -> None:
    whole, part = [9.0, 3.0, 2.0, 1.0], [None, 3.0, 2.0, 1.0]
    found = agreement(of_kind("a", [whole] * 4) + of_kind("b", [part] * 4))
    assert only_pair(found).correlation == pytest.approx(1.0)
    assert [kind.split_half for kind in found.kinds] == pytest.approx([1.0, 1.0])
    # A kind that has a score of one common layer only cannot be compared at all.
    lonely = agreement(of_kind("a", [whole] * 4) + of_kind("b", [[None, None, None, 1.0]] * 4))
    assert lonely.pairs == ()


def planted(
    rng: np.random.Generator, kinds: dict[str, NDArray[np.float64]], *, examples: int, noise: float
) -> list[ExampleScores]:
    """Examples of each kind, scattered about the kind's true scores."""
    return [
        example
        for kind, true in kinds.items()
        for example in of_kind(kind, true + noise * rng.normal(size=(examples, len(true))))
    ]


def test_planted_agreement_and_disagreement_are_told_apart() -> None:
    rng = np.random.default_rng(7)
    chat = rng.exponential(size=28)
    kinds = {"chat": chat, "talk": chat, "code": rng.permutation(chat)}
    found = agreement(planted(rng, kinds, examples=24, noise=0.4))
    assert {pair.kinds: pair.verdict for pair in found.pairs} == {
        ("chat", "talk"): "agree",
        ("chat", "code"): "differ",
        ("talk", "code"): "differ",
    }
    assert found.conclusion() == (
        "chat and talk agree on the ranking of layers; "
        "chat and code, talk and code rank layers differently"
    )


@pytest.mark.parametrize("noise", [0.5, 1.5, 5.0])
def test_noise_is_never_called_a_difference(noise: float) -> None:
    """The same true scores: at worst it cannot be told, however small the correlation gets."""
    rng = np.random.default_rng(8)
    true = rng.exponential(size=16)
    kinds = {"a": true, "b": true}
    every = (planted(rng, kinds, examples=8, noise=noise) for _ in range(6))
    found = [only_pair(agreement(examples)) for examples in every]
    assert {pair.verdict for pair in found} <= {"agree", "open"}
    if noise == 5.0:
        # Percentiles, or the correlation alone, would have had these differ.
        assert max(pair.correlation for pair in found) < 0.7


def test_a_kind_that_is_all_noise_is_not_judged() -> None:
    rng = np.random.default_rng(10)
    steady = planted(rng, {"steady": np.arange(12.0)}, examples=12, noise=0.5)
    found = agreement([*steady, *of_kind("noise", rng.normal(size=(12, 12)))])
    assert [(kind.split_half or 0) > 0.5 for kind in found.kinds] == [True, False]
    assert only_pair(found).high < 0.7, "this would be a difference"
    assert only_pair(found).verdict == "open"


def test_intervals_hold_the_true_correlation() -> None:
    """Nine of ten in the long run, where rankings are reliable; percentiles alone hold few."""
    rng = np.random.default_rng(10)
    held, found = 0, []
    for trial in range(24):
        chat = rng.exponential(size=20)
        code = chat + (0.0 if trial % 2 else 0.8) * rng.normal(size=20)
        result = agreement(planted(rng, {"a": chat, "b": code}, examples=16, noise=0.6))
        assert all((kind.split_half or 0) > 0.5 for kind in result.kinds)
        pair = only_pair(result)
        true = spearmanr(chat, code).statistic
        held += pair.low - 1e-9 <= true <= pair.high + 1e-9
        found.append(pair)
    assert held >= 19, "18 of 24 have a chance of 0.1% at 0.95, of 3% at 0.9"
    # The interval says something all the same.
    assert np.mean([pair.high - pair.low for pair in found]) < 0.5


def test_agreement_is_json_and_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(11)
    chat = np.arange(8.0)
    examples = planted(rng, {"chat": chat, "code": chat[::-1]}, examples=12, noise=0.3)
    found = agreement([*examples, *of_kind("rare", [[1.0] * 8] * 2)])
    value = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert value["kinds"][2] == {"kind": "rare", "examples": 2, "split_half": None}
    first = value["pairs"][0]
    assert (first["kinds"], first["verdict"]) == (["chat", "code"], "differ")
    show_agreement(Console(json_output=False, verbosity=0), found)
    out, pair = capsys.readouterr().out, only_pair(found)
    assert f"{pair.correlation:.2f} [{pair.low:.2f}, {pair.high:.2f}]" in out
    assert "too few" in out and "chat and code rank layers differently" in out
