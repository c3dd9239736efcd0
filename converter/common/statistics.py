"""Means, shares, differences and rank correlations, with their errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# With fewer examples nothing is claimed: the standard error of so few is itself a guess.
FEWEST = 16
# Standard errors to each side of a mean that hold 95% of a normal distribution.
_NORMAL_95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error; the error is None when there is a single value."""

    mean: float
    stderr: float | None

    @property
    def low(self) -> float:
        """The lower end of its 95% interval; the mean itself where there is no error."""
        return self.mean - _NORMAL_95 * (self.stderr or 0.0)

    @property
    def high(self) -> float:
        """The upper end of its 95% interval."""
        return self.mean + _NORMAL_95 * (self.stderr or 0.0)

    @property
    def clearly_positive(self) -> bool:
        """Whether it is above zero by more than two standard errors."""
        return self.stderr is not None and self.mean > 2 * self.stderr

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± " + ("?" if self.stderr is None else f"{self.stderr:.3f}")


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of the mean (sample deviation over the root of the count)."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, None)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Estimate(mean, math.sqrt(variance / count))


def perplexity(nll: Sequence[float]) -> Estimate:
    """Perplexity from each chunk's mean loss in nats per token, with its standard error.

    Between chunks, as tokens of one chunk are too much alike to count as independent.
    """
    loss = estimate(nll)
    # Beyond this the exponential is no number any more, and no model either.
    value = math.exp(min(loss.mean, 700.0))
    return Estimate(value, None if loss.stderr is None else value * loss.stderr)


@dataclass(frozen=True)
class Share:
    """How many of n came out right, with Wilson's 95% interval, which is never empty at 0 or n."""

    accuracy: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.accuracy:.3f} [{self.low:.3f}, {self.high:.3f}]"


def share(right: float, n: int) -> Share:
    """The share of `right` among `n` (Wilson 1927, score interval).

    With partial credit it is on the safe side: zeros and ones vary the most at the same mean.
    """
    z = _NORMAL_95
    p = right / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Share(p, max(0.0, middle - half), min(1.0, middle + half), n)


def accuracy(scores: Sequence[float]) -> Share:
    """Mean of scores between 0 and 1, with Wilson's 95% interval."""
    return share(math.fsum(scores), len(scores))


@dataclass(frozen=True)
class Difference:
    """A paired difference of mean scores with its 95% interval."""

    mean: float
    low: float
    high: float
    n: int


def paired_difference(scores: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Mean of `scores - baseline`, from 0 to 1 of the same items, with its 95% interval.

    Gains and losses are two shares of the items, each with Wilson's interval, combined by the
    method of variance estimates recovery with their correlation as shares of one sample
    (Newcombe 1998; Zou and Donner 2008). The interval is never empty.
    """
    differences = [a - b for a, b in zip(scores, baseline, strict=True)]
    gain = accuracy([max(d, 0.0) for d in differences])
    loss = accuracy([max(-d, 0.0) for d in differences])
    room = (1 - gain.accuracy) * (1 - loss.accuracy)
    # Gains and losses exclude each other: the more of one, the less of the other.
    product = gain.accuracy * loss.accuracy
    correlation = max(-1.0, -math.sqrt(product / room)) if room > 0 else -1.0

    def half(gain_side: float, loss_side: float) -> float:
        return math.sqrt(gain_side**2 + loss_side**2 - 2 * correlation * gain_side * loss_side)

    mean = gain.accuracy - loss.accuracy
    below = half(gain.accuracy - gain.low, loss.high - loss.accuracy)
    above = half(gain.high - gain.accuracy, loss.accuracy - loss.low)
    return Difference(mean, max(-1.0, mean - below), min(1.0, mean + above), gain.n)


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Spearman's rank correlation; 0 when one side does not vary at all."""
    import numpy as np

    return float(rank_correlations(np.array([left]), np.array([right]))[0])


def rank_correlations(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spearman's correlation of each row (rows, values) with its other; 0 where one is constant."""
    import numpy as np

    def deviations(rows: NDArray[np.float64]) -> NDArray[np.float64]:
        # Twice the rank, up to a constant: how many are below or equal, and how many below.
        ones, others = rows[:, :, None], rows[:, None, :]
        ranks: NDArray[np.int64] = (others <= ones).sum(axis=2) + (others < ones).sum(axis=2)
        centred: NDArray[np.float64] = ranks - ranks.mean(axis=1, keepdims=True)
        return centred

    first, second = deviations(left), deviations(right)
    scale = np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
    found: NDArray[np.float64] = np.divide(
        (first * second).sum(axis=1), scale, out=np.zeros_like(scale), where=scale > 0
    )
    return found


def t_tail(t: float, degrees: int) -> float:
    """How likely Student's t is above a value (Abramowitz and Stegun, 26.5.27 and 26.7.1)."""
    from mpmath import betainc

    outside = float(betainc(degrees / 2, 0.5, 0, degrees / (degrees + t * t), regularized=True))
    return outside / 2 if t >= 0 else 1 - outside / 2
