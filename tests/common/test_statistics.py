"""Intervals hold what they say, and are never empty."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from converter.common.statistics import accuracy, paired_difference, perplexity, share


def test_accuracy_of_zeros_and_ones_is_wilsons() -> None:
    assert accuracy([1.0] * 7 + [0.0] * 3) == share(7, 10)
    assert accuracy([0.5] * 10).accuracy == 0.5
    everything = accuracy([1.0] * 20)
    assert everything.low < 1.0 == everything.high


def test_paired_difference_is_newcombes() -> None:
    """Newcombe 1998 (Statistics in Medicine 17, 2635): its interval by hand for b=9, c=3, n=50."""
    scores = [1.0] * 9 + [0.0] * 3 + [1.0] * 20 + [0.0] * 18
    baseline = [0.0] * 9 + [1.0] * 3 + [1.0] * 20 + [0.0] * 18
    found = paired_difference(scores, baseline)
    gain, loss = share(9, 50), share(3, 50)
    correlation = -math.sqrt((9 * 3) / (41 * 47))
    below, above = gain.accuracy - gain.low, loss.high - loss.accuracy
    low = 6 / 50 - math.sqrt(below**2 + above**2 - 2 * correlation * below * above)
    below, above = gain.high - gain.accuracy, loss.accuracy - loss.low
    high = 6 / 50 + math.sqrt(below**2 + above**2 - 2 * correlation * below * above)
    assert (found.mean, found.low, found.high) == pytest.approx((0.12, low, high))
    assert found.low < 0 < found.high
    mirrored = paired_difference(baseline, scores)
    assert (mirrored.low, mirrored.high) == pytest.approx((-high, -low))


def test_equal_scores_leave_an_interval() -> None:
    found = paired_difference([1.0] * 30, [1.0] * 30)
    assert found.mean == 0
    assert found.low == -found.high
    assert 0.05 < found.high < 0.2
    lost = paired_difference([0.0] * 30, [1.0] * 30)
    assert (lost.mean, lost.low) == (-1.0, -1.0)
    assert lost.high == pytest.approx(-1 + 2 * (1 - share(30, 30).low))


@pytest.mark.parametrize("partial", [False, True], ids=["right or wrong", "partial credit"])
@pytest.mark.parametrize(("base", "lost", "won"), [(0.9, 0.1, 0.02), (0.5, 0.3, 0.1), (1, 0, 0)])
def test_intervals_hold_the_truth_as_often_as_they_say(
    base: float, lost: float, won: float, partial: bool
) -> None:
    """Simulated pairs with a known difference; 95% nominal, at least 93% in 1,500 draws."""
    rng = random.Random(3)  # noqa: S311 - a reproducible simulation
    held, draws = 0, 1500
    credit = 0.5 if partial else 1.0
    truth = credit * ((1 - base) * won - base * lost)
    for _ in range(draws):
        first = [rng.random() < base for _ in range(60)]
        second = [rng.random() >= lost if right else rng.random() < won for right in first]
        found = paired_difference([credit * x for x in second], [credit * x for x in first])
        held += found.low - 1e-12 <= truth <= found.high + 1e-12
    assert held / draws >= 0.93


def test_perplexity_carries_its_error() -> None:
    losses = [1.0, 1.2, 0.9, 1.1]
    found = perplexity(losses)
    assert found.mean == pytest.approx(math.exp(statistics.mean(losses)))
    assert found.stderr == pytest.approx(found.mean * statistics.stdev(losses) / 2)
    assert perplexity([1.0]).stderr is None
    assert math.isfinite(perplexity([1e6, 1e6]).mean)
