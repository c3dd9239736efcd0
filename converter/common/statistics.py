"""Means and shares with their errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error; the error is None when there is a single value."""

    mean: float
    stderr: float | None

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
    """The share of `right` among `n` (Wilson 1927, score interval)."""
    z = NormalDist().inv_cdf(0.975)
    p = right / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Share(p, max(0.0, middle - half), min(1.0, middle + half), n)
