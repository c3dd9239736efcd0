"""How far a ranking of layers can be trusted: resampling the examples it was measured on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converter.calibration.scores import ExampleScores, Scores

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_RESAMPLES = 2000
_SPLITS = 200


@dataclass(frozen=True)
class Inclusion:
    """How often layers come out among the best when examples are drawn anew (bootstrap).

    Attributes:
        keep: how many layers are chosen.
        by_layer: share of resamples in which each layer is chosen.
        same_set: share of resamples in which exactly the same layers are chosen.
    """

    keep: int
    by_layer: tuple[float, ...]
    same_set: float


def inclusion(scores: Scores, keep: int) -> Inclusion:
    """Bootstrap the choice of the best `keep` layers (2000 resamples, a fixed seed).

    A layer that was scored on some of the examples only is judged by those of them that are drawn.
    """
    import numpy as np

    table = score_table(scores.examples)
    chosen = set(scores.order[:keep])
    counts = np.zeros(table.shape[1])
    same = 0
    for means in resampled_means(table, np.random.default_rng(0)):
        best = np.argsort(-means, kind="stable")[:keep]
        counts[best] += 1
        same += set(best.tolist()) == chosen
    return Inclusion(keep, tuple((counts / _RESAMPLES).tolist()), same / _RESAMPLES)


def score_table(examples: Sequence[ExampleScores]) -> NDArray[np.float64]:
    """(examples, layers), not a number where a layer was not scored."""
    import numpy as np

    return np.array([[np.nan if s is None else s for s in e.scores] for e in examples], dtype=float)


def resampled_means(
    table: NDArray[np.float64], rng: np.random.Generator
) -> Iterator[NDArray[np.float64]]:
    """Each layer's mean over examples drawn anew with replacement, 2000 times.

    Args:
        table: (examples, layers), not a number where a layer was not scored; no layer nowhere.
        rng: draws.
    """
    import numpy as np

    # What never went missing in the measurement must not in a resample: its mean stands in.
    means = np.nanmean(table, axis=0)
    for _ in range(_RESAMPLES):
        drawn = table[rng.integers(len(table), size=len(table))]
        present = ~np.isnan(drawn)
        totals = np.where(present, drawn, 0.0).sum(axis=0)
        yield np.where(present.any(axis=0), totals / np.maximum(present.sum(axis=0), 1), means)


def split_half(scores: Scores) -> float | None:
    """How well a ranking agrees with itself: `halves_correlation` of all examples."""
    return halves_correlation(score_table(scores.examples))


def halves_correlation(table: NDArray[np.float64]) -> float | None:
    """Spearman's correlation between the rankings of two halves of the examples.

    The mean over 200 random halvings of the examples on which every layer was scored; None with
    fewer than four of them.
    """
    import numpy as np

    table = table[~np.isnan(table).any(axis=1)]
    if len(table) < 4:
        return None
    rng = np.random.default_rng(0)
    values = []
    for _ in range(_SPLITS):
        order = rng.permutation(len(table))
        first, second = (table[half].mean(axis=0) for half in np.array_split(order, 2))
        values.append(spearman(first.tolist(), second.tolist()))
    return float(np.mean(values))


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Spearman's rank correlation; 0 when one side does not vary at all."""
    from scipy.stats import spearmanr

    if len(set(left)) == 1 or len(set(right)) == 1:
        return 0.0
    return float(spearmanr(left, right).statistic)
