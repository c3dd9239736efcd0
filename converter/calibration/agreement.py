"""Whether kinds of examples agree on which layers deserve full attention.

Two rankings that were measured on few examples differ by noise alone, so a correlation says little
without its interval and without how well each ranking agrees with itself (Spearman, 1904, on what
noise takes off a correlation).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from converter.calibration.reliability import (
    halves_correlation,
    resampled_means,
    score_table,
    spearman,
)
from converter.calibration.scores import ExampleScores

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

AGREE, DIFFER, OPEN = "agree", "differ", "open"

# Fewer have no two halves of two.
_FEWEST_EXAMPLES = 4
# Where two rankings share half of their variance.
_ALIKE = 0.7
# Halves that correlate less leave a kind's own ranking mostly unknown.
_RELIABLE = 0.5


@dataclass(frozen=True)
class KindRanking:
    """What the examples of one kind say by themselves.

    Attributes:
        kind: of the examples.
        examples: how many there are.
        best: the layers that they would keep, in order.
        split_half: rank correlation between halves of the examples; None where too few of them
            have a score for every layer.
    """

    kind: str
    examples: int
    best: tuple[int, ...]
    split_half: float | None

    @property
    def reliable(self) -> bool:
        """Whether the ranking is known well enough to be held against another."""
        return self.split_half is not None and self.split_half >= _RELIABLE


@dataclass(frozen=True)
class PairAgreement:
    """How far two kinds agree on the layers that were scored on both.

    Attributes:
        kinds: the two.
        correlation: Spearman's, between their mean scores; noise makes it smaller than it is.
        low, high: its 95% interval.
        shared: the share of the layers kept that both would keep.
        shared_resampled: its mean when each kind's examples are drawn anew.
        same_set: share of such draws in which both keep exactly the same layers.
        verdict: `agree` where the interval is wholly above 0.7, `differ` where it is wholly below,
            and `open` in between or where one of the kinds is not reliable.
    """

    kinds: tuple[str, str]
    correlation: float
    low: float
    high: float
    shared: float
    shared_resampled: float
    same_set: float
    verdict: str


@dataclass(frozen=True)
class Agreement:
    """How far kinds of examples agree on the layers.

    Attributes:
        keep: how many layers are chosen.
        layers: of how many; choices at random would share `keep / layers` of theirs.
        kinds: each kind with examples enough.
        pairs: every two of them that have at least two layers in common.
        left_out: how many examples there are of kinds that have too few.
    """

    keep: int
    layers: int
    kinds: tuple[KindRanking, ...]
    pairs: tuple[PairAgreement, ...]
    left_out: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """As it is kept in files."""
        return asdict(self)

    def finding(self) -> str:
        """What there is to say, in one sentence."""
        if not self.pairs:
            return "there are not two kinds with examples enough to compare their rankings"
        words = {
            AGREE: "agree on the ranking of layers",
            DIFFER: "rank layers differently",
            OPEN: "cannot be told to agree or to differ at this number of examples",
        }
        found = []
        for verdict, text in words.items():
            pairs = [" and ".join(pair.kinds) for pair in self.pairs if pair.verdict == verdict]
            found += [f"{', '.join(pairs)} {text}"] if pairs else []
        unjudged = {
            f"too noisy to judge (halves of the examples correlate below {_RELIABLE})": [
                kind.kind
                for kind in self.kinds
                if not kind.reliable and kind.split_half is not None
            ],
            f"not to be judged without {_FEWEST_EXAMPLES} examples scored on every layer": [
                kind.kind for kind in self.kinds if kind.split_half is None
            ],
        }
        for why, names in unjudged.items():
            if names:
                found.append(f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} {why}")
        return "; ".join(found)


def agreement(examples: Sequence[ExampleScores], keep: int) -> Agreement:
    """Compare the rankings of every two kinds of examples.

    A layer that was scored on some of the examples only is judged by those, as `inclusion` does;
    one that a kind has no score of is left out wherever that kind is compared.

    Args:
        examples: scored, of any number of kinds.
        keep: how many layers are chosen, at least 1.
    """
    import numpy as np

    by_kind: dict[str, list[ExampleScores]] = {}
    for example in examples:
        by_kind.setdefault(example.kind, []).append(example)
    enough = {kind: es for kind, es in by_kind.items() if len(es) >= _FEWEST_EXAMPLES}
    total = len(examples[0].scores)
    kinds, drawn = [], []
    for place, (kind, own) in enumerate(enough.items()):
        table = score_table(own)
        scored = np.asarray(np.isfinite(table).any(axis=0))
        # Each kind's own stream, or kinds of one size would draw the same places together.
        means = _Means.of(table, scored, np.random.default_rng([0, place]))
        order = np.argsort(-means.measured, kind="stable")[: min(keep, scored.sum())]
        halves = halves_correlation(table[:, scored])
        kinds.append(KindRanking(kind, len(own), tuple(order.tolist()), halves))
        drawn.append(means)
    pairs = (
        _pair((kinds[i], kinds[j]), (drawn[i], drawn[j]), keep)
        for i, j in combinations(range(len(kinds)), 2)
    )
    return Agreement(
        keep=keep,
        layers=total,
        kinds=tuple(kinds),
        pairs=tuple(pair for pair in pairs if pair is not None),
        left_out={kind: len(es) for kind, es in by_kind.items() if kind not in enough},
    )


@dataclass(frozen=True)
class _Means:
    """Mean scores of one kind, not a number for a layer without any.

    Attributes:
        measured: (layers,) over the examples.
        resampled: (draws, layers) over examples drawn anew.
    """

    measured: NDArray[np.float64]
    resampled: NDArray[np.float64]

    @classmethod
    def of(
        cls, table: NDArray[np.float64], scored: NDArray[np.bool_], rng: np.random.Generator
    ) -> _Means:
        import numpy as np

        draws = np.array(list(resampled_means(table[:, scored], rng)))
        resampled = np.full((len(draws), table.shape[1]), np.nan)
        resampled[:, scored] = draws
        measured = np.full(table.shape[1], np.nan)
        measured[scored] = np.nanmean(table[:, scored], axis=0)
        return cls(measured, resampled)


def _pair(
    kinds: tuple[KindRanking, KindRanking], means: tuple[_Means, _Means], keep: int
) -> PairAgreement | None:
    """Two kinds on the layers that both have scores of; None with fewer than two such layers."""
    import numpy as np

    common = ~np.isnan(means[0].measured) & ~np.isnan(means[1].measured)
    if common.sum() < 2:
        return None
    measured = [each.measured[common] for each in means]
    resampled = [each.resampled[:, common] for each in means]
    correlation = spearman(measured[0].tolist(), measured[1].tolist())
    low, high = interval(correlation, rank_correlations(resampled[0], resampled[1]))
    shared = _shared([values[None] for values in measured], keep)
    shared_resampled = _shared(resampled, keep)
    return PairAgreement(
        kinds=(kinds[0].kind, kinds[1].kind),
        correlation=correlation,
        low=low,
        high=high,
        shared=float(shared[0]),
        shared_resampled=float(shared_resampled.mean()),
        same_set=float((shared_resampled == 1).mean()),
        verdict=_verdict(low, high, reliable=all(kind.reliable for kind in kinds)),
    )


def _verdict(low: float, high: float, *, reliable: bool) -> str:
    if not reliable:
        return OPEN
    return AGREE if low > _ALIKE else DIFFER if high < _ALIKE else OPEN


def _shared(sides: Sequence[NDArray[np.float64]], keep: int) -> NDArray[np.float64]:
    """Row by row, the share of its best `keep` layers that one side has in common with the other.

    Args:
        sides: two of (rows, layers); at most all layers are kept.
        keep: how many.
    """
    import numpy as np

    kept = min(keep, sides[0].shape[1])
    chosen = []
    for side in sides:
        best = np.zeros(side.shape, dtype=bool)
        np.put_along_axis(best, np.argsort(-side, axis=1, kind="stable")[:, :kept], True, axis=1)
        chosen.append(best)
    shared: NDArray[np.float64] = (chosen[0] & chosen[1]).sum(axis=1) / kept
    return shared


def rank_correlations(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spearman's correlation of each row with its counterpart; 0 where one does not vary.

    Args:
        left, right: (rows, layers).
    """
    import numpy as np
    from scipy.stats import rankdata

    ranks = [rankdata(side, axis=1) for side in (left, right)]
    first, second = (side - side.mean(axis=1, keepdims=True) for side in ranks)
    scale = np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
    products = (first * second).sum(axis=1)
    found: NDArray[np.float64] = np.divide(
        products, scale, out=np.zeros_like(scale), where=scale > 0
    )
    return found


def interval(measured: float, resampled: NDArray[np.float64]) -> tuple[float, float]:
    """A 95% interval for a correlation, from its values on examples drawn anew.

    Noise pulls correlations to 0, and drawing anew adds to the noise, so the usual percentiles
    lie too low as soon as rankings nearly agree. Reflecting them about the measured value (the
    basic interval: Davison and Hinkley, 1997, 5.2) makes up for that where it can; the interval
    reaches from the lower to the upper end of both. Of simulated rankings whose halves correlate
    above 0.5 it holds the true correlation in about nine of ten; in noise far fewer, which is why
    such rankings are not judged.
    """
    import numpy as np

    low, high = (float(q) for q in np.quantile(resampled, [0.025, 0.975]))
    return (
        max(-1.0, min(low, 2 * measured - high)),
        min(1.0, max(high, 2 * measured - low)),
    )
