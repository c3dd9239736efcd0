"""What scores must show, and must not, if they measure what they say, and how sure they are.

Controls, each a measurement:

- null: prompts no longer than the window, where sliding hides nothing: every score is exactly 0.
- evidence in window: the same texts with the evidence moved next to the question: scores collapse.
- generic sensitivity: what taking a layer's attention away altogether does to the loss. A ranking
  that only repeats this one would say nothing of long range.

From the scores alone:

- split half: how far the rankings of two halves of the examples agree.
- inclusion: how often each layer is among the chosen ones when examples are drawn anew.
- agreement: how far the rankings of two kinds of examples agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, islice
from math import fsum
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from converter.calibration.data.examples import digest_of
from converter.calibration.evaluator import open_evaluator
from converter.calibration.run import CalibrationRun
from converter.calibration.scores import ExampleScores, Scores
from converter.calibration.selectors import scorer_of
from converter.common.progress import Progress
from converter.common.statistics import rank_correlations, spearman
from converter.inference.example import Example
from converter.inference.positions import NO_ATTENTION, layer_forwards, token_spans
from converter.model.mask import FULL, Mask

if TYPE_CHECKING:
    from converter.inference.runner import Advance, ModelRunner

# Enough to see whether a control holds; more would cost more than the scores themselves.
_MOST_EXAMPLES = 16
_RESAMPLES = 2000
_SPLITS = 200
# Fewer examples have no two halves of two.
_FEWEST_EXAMPLES = 4
# Where two rankings share half of their variance.
_ALIKE = 0.7
# Halves that correlate less leave a kind's own ranking mostly unknown.
_RELIABLE = 0.5


@dataclass(frozen=True)
class Inclusion:
    """How often layers come out among the best when examples are drawn anew (bootstrap).

    Attributes:
        by_layer: share of resamples in which each layer is among the `keep` chosen.
        same_set: share of resamples in which exactly the same layers are chosen.
    """

    keep: int
    by_layer: tuple[float, ...]
    same_set: float


@dataclass(frozen=True)
class Controls:
    """What the controls found; None where one cannot be measured on these examples.

    Attributes:
        null_largest: the largest score of prompts within the window, whatever its sign; must be
            exactly 0.
        near_share: their scores' absolute sum, as a share of what it was with distant evidence.
        sensitivity: what losing each layer's attention adds to the loss, nats per token.
        sensitivity_correlation: its rank correlation with the scores.
        inclusion: how often layers are chosen, for the number that was raced for, or a quarter.
    """

    null_examples: int
    null_largest: float | None
    near_examples: int
    near_share: float | None
    sensitivity: tuple[float, ...]
    sensitivity_correlation: float
    split_half: float | None
    inclusion: Inclusion

    @property
    def ok(self) -> bool:
        """Whether nothing was found that must not be."""
        return self.null_largest in (None, 0.0)

    def to_json(self) -> dict[str, Any]:
        """As kept in the scores file."""
        return asdict(self)


def measure_controls(run: CalibrationRun, scores: Scores, progress: Progress) -> Controls:
    """Run the controls on the examples that layers were scored on.

    Raises:
        ScoresError: the work folder holds controls of another measurement.
        OutputError: the work folder cannot be written.
    """
    examples = run.examples.scored
    null = [_within_window(e, run.mask) for e in examples[:_MOST_EXAMPLES]]
    near = dict(islice(run.near_examples().items(), _MOST_EXAMPLES))
    # By what they say, so that more examples go on from what was measured on fewer.
    digests = [digest_of(example) for example in examples]
    named = {f"null {digests[i]}": e for i, e in enumerate(null) if e is not None}
    named |= {f"near {digests[index]}": e for index, e in near.items()}
    named |= {f"far {digests[index]}": examples[index] for index in near}
    scored = _scored(run, scores, named, progress)
    losses = _without_attention(run, scores, examples[:_MOST_EXAMPLES], progress)
    zeros = [abs(s) for name, values in scored.items() if name[:4] == "null" for s in values]
    near_sum, far_sum = (
        fsum(abs(s) for index in near for s in scored[f"{where} {digests[index]}"])
        for where in ("near", "far")
    )
    sensitivity = tuple(fsum(column) / len(column) for column in zip(*losses, strict=True))
    keep = scores.race.keep if scores.race else -(-scores.units.total // 4)
    return Controls(
        null_examples=sum(e is not None for e in null),
        null_largest=max(zeros, default=None),
        near_examples=len(near),
        near_share=near_sum / far_sum if near else None,
        sensitivity=sensitivity,
        sensitivity_correlation=spearman(sensitivity, [s.mean for s in scores.estimates]),
        split_half=split_half(scores.examples),
        inclusion=inclusion(scores, keep),
    )


def _within_window(example: Example, mask: Mask) -> Example | None:
    """The end of an example, cut to the window; None when too little of the prompt is left."""
    room = mask.window_tokens - len(example.answer)
    if room <= max(1, mask.sink_tokens):
        return None
    return Example(example.prompt[-room:], example.answer, example.kind)


def _scored(
    run: CalibrationRun, scores: Scores, examples: Mapping[str, Example], progress: Progress
) -> dict[str, Sequence[float]]:
    # What a search finds of single layers depends on the others; restore-one does not.
    scorer, mask, layers = scorer_of(scores.method), run.mask, range(scores.units.total)

    def find(
        runner: ModelRunner, some: Sequence[Example], advance: Advance
    ) -> list[dict[str, object]]:
        # One by one, because a batch rounds otherwise and the null must be 0 exactly.
        measured = scorer.measure(runner.one_by_one(), some, layers, advance, run.units)
        return [{"scores": list(one.scores)} for one in measured]

    def cost(example: Example) -> float:
        spans = token_spans(example, mask, kinds=run.source.shape.kinds)
        return scorer.cost_of_scoring(spans, mask, run.units, layers)

    several = list(examples.values())
    with (
        open_evaluator(run, several, "controls") as evaluator,
        evaluator.tallying("controls", 0.0, progress),
    ):
        gradients = scorer.needs_gradients
        records = evaluator.records(
            scorer.name, find, cost, range(len(several)), needs_gradients=gradients
        )
    return {name: record["scores"] for name, record in zip(examples, records, strict=True)}


def _without_attention(
    run: CalibrationRun, scores: Scores, examples: Sequence[Example], progress: Progress
) -> list[Sequence[float]]:
    """For each example, what each layer's missing attention adds to the full model's loss."""
    total, mask = scores.units.total, run.mask
    whole = (FULL,) * total
    plans = [whole, *((*whole[:i], NO_ATTENTION, *whole[i + 1 :]) for i in range(total))]

    def find(
        runner: ModelRunner, some: Sequence[Example], advance: Advance
    ) -> list[dict[str, object]]:
        return [
            {"added": [answer.nll - answers[0].nll for answer in answers[1:]]}
            for answers in runner.answers(some, plans, advance)
        ]

    def cost(example: Example) -> float:
        spans = token_spans(example, mask, plans, run.source.shape.kinds)
        return layer_forwards(plans, spans, mask)

    with (
        open_evaluator(run, examples, "sensitivity") as evaluator,
        evaluator.tallying("sensitivity", 0.0, progress),
    ):
        records = evaluator.records("without attention", find, cost, range(len(examples)))
    return [record["added"] for record in records]


def inclusion(scores: Scores, keep: int) -> Inclusion:
    """Bootstrap the choice of the best `keep` layers (2000 resamples, a fixed seed).

    A layer that was scored on some of the examples only is judged by those of them that are drawn.
    """
    table = _score_table(scores.examples)
    chosen = {scores.numbers.index(unit) for unit in scores.order[:keep]}
    counts = np.zeros(table.shape[1])
    same = 0
    for means in _resampled_means(table, np.random.default_rng(0)):
        best = np.argsort(-means, kind="stable")[:keep]
        counts[best] += 1
        same += set(best.tolist()) == chosen
    return Inclusion(keep, tuple((counts / _RESAMPLES).tolist()), same / _RESAMPLES)


def _score_table(examples: Sequence[ExampleScores]) -> NDArray[np.float64]:
    """(examples, layers), not a number where a layer was not scored."""
    return np.array([[np.nan if s is None else s for s in e.scores] for e in examples], dtype=float)


def _means(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each layer's mean over the examples it was scored on; not a number without any."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.nansum(table, axis=0) / (~np.isnan(table)).sum(axis=0))


def _resampled_means(
    table: NDArray[np.float64], rng: np.random.Generator
) -> Iterator[NDArray[np.float64]]:
    """Each layer's mean over examples drawn anew with replacement, 2000 times."""
    # What was measured at all must not go missing in a resample: its mean stands in.
    measured = _means(table)
    for _ in range(_RESAMPLES):
        means = _means(table[rng.integers(len(table), size=len(table))])
        yield np.where(np.isnan(means), measured, means)


def split_half(examples: Sequence[ExampleScores]) -> float | None:
    """Spearman's correlation between the rankings of two halves of the examples.

    The mean over 200 random halvings of the examples on which every layer was scored, of those that
    were scored at all; None with fewer than four of them.
    """
    table = _score_table(examples)
    table = table[:, np.isfinite(table).any(axis=0)]
    table = table[np.isfinite(table).all(axis=1)]
    if len(table) < _FEWEST_EXAMPLES:
        return None
    rng = np.random.default_rng(0)
    values = []
    for _ in range(_SPLITS):
        order = rng.permutation(len(table))
        first, second = (table[half].mean(axis=0) for half in np.array_split(order, 2))
        values.append(spearman(first.tolist(), second.tolist()))
    return float(np.mean(values))


@dataclass(frozen=True)
class KindRanking:
    """The ranking by the examples of one kind alone; no `split_half` with too few to tell."""

    kind: str
    examples: int
    split_half: float | None


@dataclass(frozen=True)
class PairAgreement:
    """How far two kinds agree on the layers that were scored on both.

    Attributes:
        correlation: Spearman's, between their mean scores; noise makes it smaller than it is.
        low, high: its 95% interval.
        verdict: `agree` where the interval is wholly above 0.7, `differ` where it is wholly below,
            and `open` in between or where one of the kinds hardly agrees with itself.
    """

    kinds: tuple[str, str]
    correlation: float
    low: float
    high: float
    verdict: str


@dataclass(frozen=True)
class Agreement:
    """Every kind of examples, and every two that can be compared."""

    kinds: tuple[KindRanking, ...]
    pairs: tuple[PairAgreement, ...]

    def to_json(self) -> dict[str, Any]:
        """As it is printed."""
        return asdict(self)

    def conclusion(self) -> str:
        """What there is to say, in one sentence."""
        found = []
        for verdict, text in (
            ("agree", "agree on the ranking of layers"),
            ("differ", "rank layers differently"),
            ("open", "cannot be told to agree or to differ at this number of examples"),
        ):
            pairs = [" and ".join(pair.kinds) for pair in self.pairs if pair.verdict == verdict]
            found += [f"{', '.join(pairs)} {text}"] if pairs else []
        nothing = "there are not two kinds with examples enough to compare their rankings"
        return "; ".join(found) or nothing


def agreement(examples: Sequence[ExampleScores]) -> Agreement:
    """Compare the rankings of every two kinds of at least four examples.

    Nothing is claimed where one of them does not agree with itself (Spearman, 1904).
    """
    by_kind: dict[str, list[ExampleScores]] = {}
    for example in examples:
        by_kind.setdefault(example.kind, []).append(example)
    kinds = [KindRanking(kind, len(own), split_half(own)) for kind, own in by_kind.items()]
    enough = [kind for kind in kinds if kind.examples >= _FEWEST_EXAMPLES]
    means = []
    for stream, kind in enumerate(enough):
        table = _score_table(by_kind[kind.kind])
        # Each kind's own stream, or kinds of one size would draw the same examples together.
        drawn = _resampled_means(table, np.random.default_rng([0, stream]))
        means.append(np.array([_means(table), *drawn]))
    pairs = []
    for (left, first), (right, second) in combinations(zip(enough, means, strict=True), 2):
        # Only the layers that both kinds have scores of.
        common = np.isfinite(first[0]) & np.isfinite(second[0])
        if common.sum() < 2:
            continue
        measured, *resampled = rank_correlations(first[:, common], second[:, common]).tolist()
        low, high = correlation_interval(measured, resampled)
        verdict = "agree" if low > _ALIKE else "differ" if high < _ALIKE else "open"
        if min(left.split_half or 0.0, right.split_half or 0.0) < _RELIABLE:
            verdict = "open"
        pairs.append(PairAgreement((left.kind, right.kind), measured, low, high, verdict))
    return Agreement(tuple(kinds), tuple(pairs))


def correlation_interval(measured: float, resampled: Sequence[float]) -> tuple[float, float]:
    """A 95% interval for a correlation, from its values on examples drawn anew.

    Noise pulls correlations to 0, and drawing anew adds to the noise, so the usual percentiles
    lie too low as soon as rankings nearly agree. Reflecting them about the measured value (the
    basic interval: Davison and Hinkley, 1997, 5.2) makes up for that where it can; the interval
    reaches from the lower to the upper end of both. Of simulated rankings whose halves correlate
    above 0.5 it holds the true correlation in about nine of ten; in noise far fewer.
    """
    low, high = (float(q) for q in np.quantile(resampled, [0.025, 0.975]))
    return max(-1.0, min(low, 2 * measured - high)), min(1.0, max(high, 2 * measured - low))
