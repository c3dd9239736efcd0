"""Scores: what each layer's attention is worth, example by example, with its error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from converter.errors import PlanError, ScoresError
from converter.files import read_json_object
from converter.mask import FULL, Mask
from converter.selectors import MEASURED
from converter.selectors.base import rank

FORMAT_VERSION = 1


@dataclass(frozen=True)
class ExampleNll:
    """Mean answer NLL of one example in nats per token, under each switch.

    Attributes:
        kind: what the example exercises.
        prompt_tokens, answer_tokens: its length.
        full: with all layers full.
        sliding: with all layers sliding.
        switched: with one layer switched, by layer.
        seconds: time it took.
    """

    kind: str
    prompt_tokens: int
    answer_tokens: int
    full: float
    sliding: float
    switched: tuple[float, ...]
    seconds: float

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ExampleNll:
        """Read what `dataclasses.asdict` gave."""
        return cls(**{**value, "switched": tuple(value["switched"])})


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


@dataclass(frozen=True)
class Scores:
    """A measurement that plans are decided from.

    Attributes:
        method: the selector's name.
        mask: the mask it was measured under.
        examples: the measured losses.
        layer_forwards: decoder layers run, summed over all forward passes.
        fingerprint: everything the losses depend on.
    """

    method: str
    mask: Mask
    examples: tuple[ExampleNll, ...]
    layer_forwards: int
    fingerprint: Mapping[str, Any]

    @property
    def layers(self) -> tuple[Estimate, ...]:
        """Each layer's score and standard error, in nats per answer token."""
        selector = MEASURED[self.method]
        uniform = [e.full if selector.others == FULL else e.sliding for e in self.examples]
        return tuple(
            estimate(
                [
                    selector.score(base, example.switched[layer])
                    for base, example in zip(uniform, self.examples, strict=True)
                ]
            )
            for layer in range(len(self.examples[0].switched))
        )

    @property
    def ranking(self) -> tuple[int, ...]:
        """Layers by descending score."""
        return rank([score.mean for score in self.layers])

    def to_json(self) -> dict[str, Any]:
        """The scores as they are saved; `load_scores` reads them back."""
        return {
            "format_version": FORMAT_VERSION,
            "method": self.method,
            "mask": self.mask.to_json(),
            "layers": [
                {"index": index, "score": score.mean, "stderr": score.stderr}
                for index, score in enumerate(self.layers)
            ],
            "examples": len(self.examples),
            "nll": {
                "full": asdict(estimate([e.full for e in self.examples])),
                "sliding": asdict(estimate([e.sliding for e in self.examples])),
            },
            "seconds": math.fsum(e.seconds for e in self.examples),
            "layer_forwards": self.layer_forwards,
            "fingerprint": dict(self.fingerprint),
            "per_example": [asdict(example) for example in self.examples],
        }


def load_scores(path: Path) -> Scores:
    """Read a scores file.

    Raises:
        ScoresError: the file is missing or is not a scores file of this version.
    """
    value = read_json_object(path, ScoresError, "hybridize calibrate SOURCE --out scores.json")
    if value.get("format_version") != FORMAT_VERSION or value.get("method") not in tuple(MEASURED):
        raise ScoresError(
            "this is not a scores file of this version",
            where=path,
            expected=f"format_version {FORMAT_VERSION} and method {' or '.join(MEASURED)}",
            got=f"format_version {value.get('format_version')}, method {value.get('method')}",
        )
    try:
        examples = tuple(ExampleNll.from_json(record) for record in value["per_example"])
        lengths = {len(example.switched) for example in examples}
        if len(lengths) != 1:
            raise ValueError(f"{sorted(lengths)} layers per example")
        numbers = [x for e in examples for x in (e.full, e.sliding, *e.switched, e.seconds)]
        if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers):
            raise ValueError("a loss is not a finite number")
        return Scores(
            method=value["method"],
            mask=Mask.from_json(value["mask"], path),
            examples=examples,
            layer_forwards=int(value["layer_forwards"]),
            fingerprint=dict(value["fingerprint"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError, PlanError) as error:
        raise ScoresError("the scores file is damaged", where=path, got=error) from error
