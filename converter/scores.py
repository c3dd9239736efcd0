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
from converter.mask import Mask
from converter.race import Race
from converter.selectors import MEASURED, ExampleScores

FORMAT_VERSION = 2


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

    It holds nothing that differs from run to run, so that equal measurements give equal files.

    Attributes:
        method: the selector's name.
        mask: the mask it was measured under.
        examples: what each example said.
        layer_forwards: decoder layers run, in runs over one whole example.
        fingerprint: everything the scores depend on.
        race: how scoring was cut short for one number of full layers; None when every layer was
            scored on every example.
        controls: results of the controls, where they were asked for.
    """

    method: str
    mask: Mask
    examples: tuple[ExampleScores, ...]
    layer_forwards: float
    fingerprint: Mapping[str, Any]
    race: Race | None = None
    controls: Mapping[str, Any] | None = None

    @property
    def layer_count(self) -> int:
        """How many layers the model has."""
        return len(self.examples[0].scores)

    def of_layer(self, layer: int) -> list[float]:
        """A layer's score on every example that it was scored on."""
        return [s for s in (e.scores[layer] for e in self.examples) if s is not None]

    @property
    def layers(self) -> tuple[Estimate, ...]:
        """Each layer's score and standard error, in nats per answer token."""
        return tuple(estimate(self.of_layer(layer)) for layer in range(self.layer_count))

    @property
    def ranking(self) -> tuple[int, ...]:
        """Layers by descending score; what a race decided comes before what it left open."""
        means = [score.mean for score in self.layers]
        place = [0 if self.race is None else self.race.place(i) for i in range(len(means))]
        return tuple(sorted(range(len(means)), key=lambda i: (place[i], -means[i], i)))

    def to_json(self) -> dict[str, Any]:
        """The scores as they are saved; `load_scores` reads them back."""
        ends = {
            "full": [e.full for e in self.examples],
            "sliding": [e.sliding for e in self.examples],
        }
        return {
            "format_version": FORMAT_VERSION,
            "method": self.method,
            "mask": self.mask.to_json(),
            "layers": [
                {
                    "index": index,
                    "score": score.mean,
                    "stderr": score.stderr,
                    "examples": len(self.of_layer(index)),
                }
                for index, score in enumerate(self.layers)
            ],
            "examples": len(self.examples),
            "nll": {
                name: asdict(estimate([value for value in values if value is not None]))
                for name, values in ends.items()
                if None not in values
            },
            "layer_forwards": self.layer_forwards,
            "race": None if self.race is None else asdict(self.race),
            "controls": None if self.controls is None else dict(self.controls),
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
        examples = tuple(ExampleScores.from_json(record) for record in value["per_example"])
        _check_examples(examples)
        race = value.get("race")
        return Scores(
            method=value["method"],
            mask=Mask.from_json(value["mask"], path),
            examples=examples,
            layer_forwards=float(value["layer_forwards"]),
            fingerprint=dict(value["fingerprint"]),
            race=None if race is None else Race.from_json(race, len(examples[0].scores)),
            controls=value.get("controls"),
        )
    except (KeyError, TypeError, ValueError, OverflowError, PlanError) as error:
        raise ScoresError("the scores file is damaged", where=path, got=error) from error


def _check_examples(examples: Sequence[ExampleScores]) -> None:
    """Raise ValueError unless every layer has a score, and every number is one."""
    lengths = {len(example.scores) for example in examples}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"{sorted(lengths)} layers per example")
    given = [x for e in examples for x in (e.full, e.sliding, *e.scores) if x is not None]
    if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in given):
        raise ValueError("a loss is not a finite number")
    for layer in range(lengths.pop()):
        if all(example.scores[layer] is None for example in examples):
            raise ValueError(f"layer {layer} has no score")
