"""Controls: what scores must show, and must not, if they measure what they are said to.

- null: prompts no longer than the window, where sliding hides nothing: every score is exactly 0.
- evidence in window: the same texts with the evidence moved next to the question: scores collapse.
- generic sensitivity: what taking a layer's attention away altogether does to the loss. A ranking
  that only repeats this one would say nothing of long range.
- split half: how far the rankings of two halves of the examples agree.
- inclusion: how often each layer is among the chosen ones when examples are drawn anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import fsum
from typing import Any

from converter.calibration.reliability import Inclusion, inclusion, spearman, split_half
from converter.calibration.run import CachedJob, CalibrationRun, run_alone
from converter.calibration.scores import Scores
from converter.calibration.selectors import scorer_of
from converter.common.progress import Progress
from converter.inference.example import Example
from converter.inference.positions import NO_ATTENTION, layer_forwards, token_spans
from converter.model.mask import FULL, Mask

# Enough to see whether a control holds; more would cost more than the scores themselves.
_MOST_EXAMPLES = 16


@dataclass(frozen=True)
class Controls:
    """What the controls found; None where one cannot be measured on these examples.

    Attributes:
        null_examples: prompts within the window.
        null_largest: the largest score among them, whatever its sign; must be exactly 0.
        near_examples: examples whose evidence fits into the window.
        near_share: their scores' absolute sum, as a share of what it was with distant evidence.
        sensitivity: what losing each layer's attention adds to the loss, nats per token.
        sensitivity_correlation: its rank correlation with the scores.
        split_half: rank correlation between halves.
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
    near = dict(list(run.near_examples().items())[:_MOST_EXAMPLES])
    pieces: dict[str, Example] = {f"null {i}": e for i, e in enumerate(null) if e is not None}
    pieces |= {f"near {place}": e for place, e in near.items()}
    pieces |= {f"far {place}": examples[place] for place in near}
    scored = _scored(run, scores, pieces, progress)
    losses = _without_attention(run, scores, examples[:_MOST_EXAMPLES], progress)
    zeros = [abs(s) for name, values in scored.items() if name[:4] == "null" for s in values]
    with_evidence = {
        kind: fsum(abs(s) for place in near for s in scored[f"{kind} {place}"])
        for kind in ("near", "far")
    }
    sensitivity = tuple(fsum(column) / len(column) for column in zip(*losses, strict=True))
    keep = scores.race.keep if scores.race else -(-scores.layer_count // 4)
    return Controls(
        null_examples=sum(e is not None for e in null),
        null_largest=max(zeros, default=None),
        near_examples=len(near),
        near_share=with_evidence["near"] / with_evidence["far"] if near else None,
        sensitivity=sensitivity,
        sensitivity_correlation=spearman(sensitivity, [s.mean for s in scores.layers]),
        split_half=split_half(scores),
        inclusion=inclusion(scores, keep),
    )


def _within_window(example: Example, mask: Mask) -> Example | None:
    """The end of an example, cut to the window; None when too little of the prompt is left."""
    room = mask.window_tokens - len(example.answer)
    if room <= max(1, mask.sink_tokens):
        return None
    return Example(example.prompt[-room:], example.answer, example.kind)


def _scored(
    run: CalibrationRun, scores: Scores, pieces: Mapping[str, Example], progress: Progress
) -> dict[str, Sequence[float]]:
    """Every layer's score on every piece, by the scorer of the scores."""
    # What a search finds of single layers depends on the others; restore-one does not.
    scorer, mask = scorer_of(scores.method), run.mask
    total = scores.layer_count
    layers = range(total)
    job = CachedJob(
        pieces,
        lambda runner, examples, advance: [
            {"scores": list(measured.scores)}
            # One by one, because a batch rounds otherwise and the null must be 0 exactly.
            for measured in scorer.measure(runner.one_by_one(), examples, layers, advance)
        ],
        lambda example: scorer.layers_cost(token_spans(example, mask), mask, total, layers),
        needs_gradients=scorer.needs_gradients,
    )
    fingerprint = run.fingerprint(list(pieces.values())) | {"method": scorer.name}
    records = run_alone(run, "controls", fingerprint, job, progress)
    return {name: record["scores"] for name, record in zip(pieces, records, strict=True)}


def _without_attention(
    run: CalibrationRun, scores: Scores, examples: Sequence[Example], progress: Progress
) -> list[Sequence[float]]:
    """For each example, what each layer's missing attention adds to the full model's loss."""
    total, mask = scores.layer_count, run.mask
    whole = (FULL,) * total
    plans = [whole, *((*whole[:i], NO_ATTENTION, *whole[i + 1 :]) for i in range(total))]
    job = CachedJob(
        {f"example {place}": example for place, example in enumerate(examples)},
        lambda runner, together, advance: [
            {"added": [answer.nll - answers[0].nll for answer in answers[1:]]}
            for answers in runner.answers(together, plans, advance)
        ],
        lambda example: layer_forwards(plans, token_spans(example, mask, plans), mask),
    )
    fingerprint = run.fingerprint(examples)
    records = run_alone(run, "sensitivity", fingerprint, job, progress)
    return [record["added"] for record in records]
