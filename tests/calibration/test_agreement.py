"""Whether kinds of examples agree on layers: known answers, scipy, and planted rankings."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import spearmanr

from converter.calibration.agreement import (
    Agreement,
    KindRanking,
    PairAgreement,
    agreement,
    interval,
    rank_correlations,
)
from converter.calibration.reliability import split_half
from converter.calibration.scores import ExampleScores
from converter.cli.console import Console
from converter.cli.tables import show_agreement
from tests.calibration.test_reliability import Row, scores_of


def of_kind(kind: str, rows: Sequence[Row] | NDArray[np.float64]) -> list[ExampleScores]:
    return [ExampleScores(kind, 100, 4, 1.0, 3.0, tuple(row)) for row in rows]


def only_pair(found: Agreement) -> PairAgreement:
    (pair,) = found.pairs
    return pair


# --- known answers --------------------------------------------------------------------------------


def test_the_correlation_is_that_of_the_mean_scores() -> None:
    rng = np.random.default_rng(3)
    left, right = rng.normal(size=(6, 9)), rng.normal(size=(11, 9))
    # The order in which kinds come and mix does not matter to their own figures.
    examples = of_kind("chat", left) + of_kind("code", right)
    mixed = [examples[i] for i in (0, *rng.permutation(np.arange(1, len(examples))))]
    for given in (examples, mixed):
        found = agreement(given, 3)
        expected = spearmanr(left.mean(axis=0), right.mean(axis=0)).statistic
        assert only_pair(found).correlation == pytest.approx(expected)
        assert [kind.kind for kind in found.kinds] == ["chat", "code"]
        for kind, table in zip(found.kinds, (left, right), strict=True):
            assert kind.examples == len(table)
            assert kind.best == tuple(np.argsort(-table.mean(axis=0))[:3])


def test_row_correlations_are_scipys() -> None:
    rng = np.random.default_rng(4)
    # Whole numbers, so that there are ties, and some rows do not vary at all.
    left, right = rng.integers(0, 4, size=(2, 200, 5)).astype(float)
    left[:3] = 1.0
    found = rank_correlations(left, right)
    for one, other, value in zip(left, right, found, strict=True):
        varies = len(set(one)) > 1 and len(set(other)) > 1
        expected = spearmanr(one, other).statistic if varies else 0.0
        assert value == pytest.approx(expected)


def test_an_interval_joins_percentiles_and_their_reflection() -> None:
    resampled = np.linspace(0.0, 0.8, 81)
    # 95% of an even spread from 0 to 0.8 lie from 0.02 to 0.78; about 0.5 that is 0.22 to 0.98.
    assert interval(0.5, resampled) == pytest.approx((0.02, 0.98))
    assert interval(0.3, resampled) == pytest.approx((-0.18, 0.78))
    assert interval(0.9, resampled) == pytest.approx((0.02, 1.0)), "no correlation is above 1"


def test_kinds_without_noise_are_certain() -> None:
    up, down = [1.0, 2.0, 3.0, 4.0, 5.0], [5.0, 4.0, 3.0, 2.0, 1.0]
    same = agreement(of_kind("a", [up] * 4) + of_kind("b", [up] * 5), 2)
    assert only_pair(same) == PairAgreement(
        ("a", "b"), pytest.approx(1.0), pytest.approx(1.0), pytest.approx(1.0), 1, 1, 1, "agree"
    )
    assert same.kinds[0] == KindRanking("a", 4, (4, 3), pytest.approx(1.0))
    opposed = agreement(of_kind("a", [up] * 4) + of_kind("b", [down] * 5), 2)
    assert only_pair(opposed) == PairAgreement(
        ("a", "b"), pytest.approx(-1.0), pytest.approx(-1.0), pytest.approx(-1.0), 0, 0, 0, "differ"
    )
    # Of three best among five from either end, one is the middle layer.
    third = only_pair(agreement(of_kind("a", [up] * 4) + of_kind("b", [down] * 4), 3))
    assert third.shared == pytest.approx(1 / 3)


def test_layers_in_common_are_those_of_all_resamples() -> None:
    """Four examples of each kind: all 256 x 256 pairs of resamples, in exact arithmetic."""
    tables = {
        "a": [[3, 1, 0, 2], [0, 3, 1, 1], [2, 0, 4, 1], [1, 2, 0, 3]],
        "b": [[0, 1, 3, 2], [3, 0, 2, 1], [0, 2, 1, 5], [1, 0, 2, 2]],
    }
    choices: dict[str, dict[frozenset[int], Fraction]] = {}
    for kind, rows in tables.items():
        shares = choices.setdefault(kind, {})
        for drawn in itertools.product(rows, repeat=4):
            sums = [sum(column) for column in zip(*drawn, strict=True)]
            best = frozenset(sorted(range(4), key=lambda i: (-sums[i], i))[:2])
            shares[best] = shares.get(best, Fraction(0)) + Fraction(1, 4**4)
    pairs = list(itertools.product(choices["a"].items(), choices["b"].items()))
    in_common = float(sum(p * q * len(x & y) for (x, p), (y, q) in pairs)) / 2
    same = float(sum(p * q for (x, p), (y, q) in pairs if x == y))
    assert 0.1 < same < in_common < 0.9, "the case can tell the two apart"
    examples = [
        example
        for kind, rows in tables.items()
        for example in of_kind(kind, [[float(score) for score in row] for row in rows])
    ]
    found = only_pair(agreement(examples, 2))
    assert found.shared_resampled == pytest.approx(in_common, abs=0.03)
    assert found.same_set == pytest.approx(same, abs=0.03)
    assert only_pair(agreement(examples, 2)) == found, "the seed is fixed"


def test_every_two_kinds_are_compared_and_small_ones_left_out() -> None:
    rng = np.random.default_rng(5)
    examples = [
        example
        for kind, count in {"a": 4, "b": 3, "c": 5, "d": 9}.items()
        for example in of_kind(kind, rng.normal(size=(count, 6)))
    ]
    found = agreement(examples, 2)
    assert [pair.kinds for pair in found.pairs] == [("a", "c"), ("a", "d"), ("c", "d")]
    assert found.left_out == {"b": 3}
    assert (found.keep, found.layers) == (2, 6)
    alone = agreement(of_kind("a", rng.normal(size=(9, 6))), 2)
    assert (len(alone.kinds), alone.pairs) == (1, ())
    assert "not two kinds" in alone.finding()


def test_halves_are_those_of_the_kind_alone() -> None:
    rng = np.random.default_rng(6)
    tables = {kind: np.arange(8) + 3 * rng.normal(size=(10, 8)) for kind in ("a", "b")}
    found = agreement([e for kind, t in tables.items() for e in of_kind(kind, t)], 2)
    for kind in found.kinds:
        assert kind.split_half == split_half(scores_of(*tables[kind.kind].tolist()))


# --- layers without all scores --------------------------------------------------------------------


def test_layers_of_a_race_are_judged_by_the_examples_they_have() -> None:
    """Layer 3 was rejected after the first example of each kind, as a race does."""
    first, later = [4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, None]
    found = agreement(of_kind("a", [first, *[later] * 7]) + of_kind("b", [first, *[later] * 7]), 2)
    pair = only_pair(found)
    assert (pair.correlation, pair.low, pair.high) == pytest.approx((1.0, 1.0, 1.0))
    assert (pair.shared, pair.same_set) == (1.0, 1.0)
    # One complete example has no halves, so nothing is claimed.
    assert [kind.split_half for kind in found.kinds] == [None, None]
    assert pair.verdict == "open"
    assert found.finding() == (
        "a and b cannot be told to agree or to differ at this number of examples; "
        "a, b are not to be judged without 4 examples scored on every layer"
    )


def test_a_layer_that_one_kind_has_no_score_of_is_not_compared() -> None:
    whole, part = [9.0, 3.0, 2.0, 1.0], [None, 3.0, 2.0, 1.0]
    found = agreement(of_kind("a", [whole] * 4) + of_kind("b", [part] * 4), 2)
    assert [kind.best for kind in found.kinds] == [(0, 1), (1, 2)]
    pair = only_pair(found)
    assert (pair.correlation, pair.shared) == pytest.approx((1.0, 1.0))
    # A kind that has a score of one common layer only cannot be compared at all.
    lonely = agreement(of_kind("a", [whole] * 4) + of_kind("b", [[None, None, None, 1.0]] * 4), 2)
    assert lonely.pairs == ()


# --- planted rankings under noise -----------------------------------------------------------------


def planted(
    rng: np.random.Generator,
    kinds: dict[str, NDArray[np.float64]],
    *,
    examples: int,
    noise: float,
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
    found = agreement(planted(rng, kinds, examples=24, noise=0.4), 7)
    verdicts = {pair.kinds: pair.verdict for pair in found.pairs}
    assert verdicts == {
        ("chat", "talk"): "agree",
        ("chat", "code"): "differ",
        ("talk", "code"): "differ",
    }
    assert found.finding() == (
        "chat and talk agree on the ranking of layers; "
        "chat and code, talk and code rank layers differently"
    )


@pytest.mark.parametrize("noise", [0.5, 1.5, 5.0])
def test_noise_is_never_called_a_difference(noise: float) -> None:
    """The same true scores: at worst it cannot be told, however small the correlation gets."""
    rng = np.random.default_rng(8)
    true = rng.exponential(size=16)
    found = [
        only_pair(agreement(planted(rng, {"a": true, "b": true}, examples=8, noise=noise), 4))
        for _ in range(6)
    ]
    assert {pair.verdict for pair in found} <= {"agree", "open"}
    if noise == 5.0:
        # Percentiles, or the correlation alone, would have had these differ.
        assert max(pair.correlation for pair in found) < 0.7


def test_a_kind_that_is_all_noise_is_said_to_be() -> None:
    rng = np.random.default_rng(9)
    steady = planted(rng, {"steady": np.arange(12.0)}, examples=12, noise=0.5)
    found = agreement([*steady, *of_kind("noise", rng.normal(size=(12, 12)))], 3)
    assert [kind.reliable for kind in found.kinds] == [True, False]
    assert only_pair(found).verdict == "open"
    assert "noise is too noisy to judge" in found.finding()


def test_intervals_hold_the_true_correlation() -> None:
    """Nine of ten in the long run, where rankings are reliable; percentiles alone hold few."""
    rng = np.random.default_rng(10)
    held, found = 0, []
    for trial in range(24):
        chat = rng.exponential(size=20)
        code = chat + (0.0 if trial % 2 else 0.8) * rng.normal(size=20)
        result = agreement(planted(rng, {"a": chat, "b": code}, examples=16, noise=0.6), 5)
        assert all(kind.reliable for kind in result.kinds)
        pair = only_pair(result)
        true = spearmanr(chat, code).statistic
        held += pair.low - 1e-9 <= true <= pair.high + 1e-9
        found.append(pair)
    assert held >= 19, "18 of 24 have a chance of 0.1% at 0.95, of 3% at 0.9"
    # The interval says something all the same.
    assert np.mean([pair.high - pair.low for pair in found]) < 0.5


# --- what is told ---------------------------------------------------------------------------------


def test_agreement_is_json_and_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(11)
    chat = np.arange(8.0)
    examples = planted(rng, {"chat": chat, "code": chat[::-1]}, examples=12, noise=0.3)
    found = agreement([*examples, *of_kind("rare", [[1.0] * 8] * 2)], 2)
    value = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert value["left_out"] == {"rare": 2}
    assert value["pairs"][0]["kinds"] == ["chat", "code"]
    assert value["pairs"][0]["verdict"] == "differ"
    assert value["kinds"][1]["best"] == [0, 1]
    show_agreement(Console(json_output=False, verbosity=0), found)
    out = capsys.readouterr().out
    pair = only_pair(found)
    for words in (
        "best 2 layers",
        "6, 7",
        f"{pair.correlation:.2f} [{pair.low:.2f}, {pair.high:.2f}]",
        "choices at random have 25% of their layers in common",
        "too few examples to compare: rare (2)",
        "chat and code rank layers differently",
    ):
        assert words in out
