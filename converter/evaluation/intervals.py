"""Intervals of evaluation results. None of them is empty, even when every answer is right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from converter.common.statistics import Estimate, Share, estimate, share


@dataclass(frozen=True)
class Difference:
    """A paired difference of mean scores with its 95% interval."""

    mean: float
    low: float
    high: float
    n: int


def accuracy(scores: Sequence[float]) -> Share:
    """Mean of scores between 0 and 1, with Wilson's 95% interval.

    Scores between 0 and 1 vary at most as much as zeros and ones of the same mean do, so that the
    interval is right for zeros and ones and on the safe side for partial credit.
    """
    return share(math.fsum(scores), len(scores))


def paired_difference(scores: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Mean of `scores - baseline` over the same items, with a 95% interval.

    Gains and losses are two shares of the items, each with Wilson's interval, combined by the
    method of variance estimates recovery with their correlation as shares of one sample
    (Newcombe 1998; Zou and Donner 2008).

    Args:
        scores, baseline: scores between 0 and 1 of the same items, at least one.
    """
    differences = [a - b for a, b in zip(scores, baseline, strict=True)]
    n = len(differences)
    gain = share(math.fsum(max(d, 0.0) for d in differences), n)
    loss = share(math.fsum(max(-d, 0.0) for d in differences), n)
    room = (1 - gain.accuracy) * (1 - loss.accuracy)
    # Gains and losses exclude each other: the more of one, the less of the other.
    correlation = -math.sqrt(gain.accuracy * loss.accuracy / room) if room > 0 else -1.0
    correlation = max(-1.0, correlation)

    def half(gain_side: float, loss_side: float) -> float:
        return math.sqrt(gain_side**2 + loss_side**2 - 2 * correlation * gain_side * loss_side)

    mean = gain.accuracy - loss.accuracy
    below = half(gain.accuracy - gain.low, loss.high - loss.accuracy)
    above = half(gain.high - gain.accuracy, loss.accuracy - loss.low)
    return Difference(mean, max(-1.0, mean - below), min(1.0, mean + above), n)


def perplexity(nll: Sequence[float]) -> Estimate:
    """Perplexity and its standard error from each chunk's mean loss in nats per token.

    The error is that between chunks, carried through the exponential: tokens of one chunk are too
    much alike to count as independent.
    """
    loss = estimate(nll)
    # Beyond this the exponential is no number any more, and no model either.
    value = math.exp(min(loss.mean, 700.0))
    return Estimate(value, None if loss.stderr is None else value * loss.stderr)
