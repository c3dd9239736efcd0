"""Scores: what each layer's attention is worth, example by example, with its error."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeGuard

from converter.calibration.results import MethodComparison
from converter.common.errors import PlanError, ScoresError
from converter.common.files import read_json_object
from converter.common.statistics import Estimate, estimate
from converter.model.mask import Mask

if TYPE_CHECKING:
    from converter.model.source import Source

FORMAT_VERSION = 3
NATS = "nats per answer token"
# Files of earlier versions do not name the unit: it was this one but for these methods.
_FAR = "share of attention out of sight"
_EARLIER_UNITS = {"kl-all": "nats per token", "lazy": _FAR, "lazy-inverted": _FAR}


@dataclass(frozen=True)
class ExampleScores:
    """What one example says of each layer.

    Attributes:
        kind: what the example exercises.
        full: mean answer NLL with all layers full, in nats per token; None where not measured.
        sliding: the same with all layers sliding.
        scores: each layer's score, higher for a layer that deserves full attention more; None for
            a layer that was not scored on this example.
    """

    kind: str
    prompt_tokens: int
    answer_tokens: int
    full: float | None
    sliding: float | None
    scores: tuple[float | None, ...]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ExampleScores:
        """Read what `dataclasses.asdict` gave."""
        return cls(**{**value, "scores": tuple(value["scores"])})


def means(examples: Sequence[ExampleScores]) -> list[float]:
    """Each layer's mean score over the examples that it was scored on."""
    columns = zip(*(example.scores for example in examples), strict=True)
    return [fmean(score for score in column if score is not None) for column in columns]


def rank(scores: Sequence[float]) -> tuple[int, ...]:
    """Layer indices by descending score; equal scores keep the order of the layers."""
    return tuple(sorted(range(len(scores)), key=lambda i: (-scores[i], i)))


@dataclass(frozen=True)
class Drawn:
    """How many examples were asked for, and how many there were."""

    asked: int
    got: int


@dataclass(frozen=True)
class Race:
    """How scoring was cut short: layers that were decided before the last example.

    Attributes:
        keep: how many layers were to be chosen.
        accepted: layers that clearly belong to the best `keep`.
        rejected: layers that clearly do not.
        screened: those of them that an earlier version decided by first-order scores alone.
        rounds: examples scored and layers scored on them, round by round.
    """

    keep: int
    accepted: tuple[int, ...] = ()
    rejected: tuple[int, ...] = ()
    screened: tuple[int, ...] = ()
    rounds: tuple[tuple[int, int], ...] = ()

    def among(self, layers: Sequence[int]) -> Race:
        """The race of a model whose layers that a plan is about are these, counted from 0 here."""
        accepted, rejected = (
            tuple(layers[i] for i in decided) for decided in (self.accepted, self.rejected)
        )
        return replace(self, accepted=accepted, rejected=rejected)

    def open_layers(self, layers: Iterable[int]) -> tuple[int, ...]:
        """Those of the layers not decided yet; none once their places are all given away."""
        left = tuple(layer for layer in layers if self.place(layer) == 1)
        return () if len(self.accepted) in (self.keep, self.keep - len(left)) else left

    def place(self, layer: int) -> int:
        """0 for an accepted layer, 1 for an open one, 2 for a rejected one."""
        return 0 if layer in self.accepted else 2 if layer in self.rejected else 1

    @classmethod
    def from_json(cls, value: Mapping[str, Any], full_layers: Collection[int]) -> Race:
        """Read what `dataclasses.asdict` gave.

        Raises:
            KeyError, TypeError, ValueError: it is no race of these layers.
        """
        decided = {name: tuple(value[name]) for name in ("accepted", "rejected", "screened")}
        layers = decided["accepted"] + decided["rejected"]
        if len(set(layers)) != len(layers) or not set(layers) <= set(full_layers):
            raise ValueError("the race decides layers twice, or layers that are not there")
        rounds = tuple((int(examples), int(layers)) for examples, layers in value["rounds"])
        return cls(keep=int(value["keep"]), rounds=rounds, **decided)


@dataclass(frozen=True)
class Scores:
    """A measurement that plans are decided from.

    It holds nothing that differs from run to run, so that equal measurements give equal files.

    Attributes:
        method: the selector whose scores these are.
        mask: the mask it was measured under.
        examples: what each example said.
        layer_forwards: decoder layers run, in runs over one whole example.
        fingerprint: everything the scores depend on.
        order: every layer that a plan is about, the one to keep first.
        model_layers: which layers of the model those are, lowest first, as each example's scores
            have them; empty where they are all.
        race: how scoring was cut short for one number of full layers; None when every layer was
            scored on every example.
        heads: a gate for each KV head of every layer, where the method tells heads apart.
        comparison: how the choice did beside others, where there were several.
        profiles: an order of the layers for each kind of input, where one was asked for.
        controls: their results, where they were asked for.
        drawn: how many examples were `scored`, and used for `validation`; scores of earlier
            versions do not know.
    """

    method: str
    mask: Mask
    examples: tuple[ExampleScores, ...]
    layer_forwards: float
    fingerprint: Mapping[str, Any]
    order: tuple[int, ...]
    unit: str = NATS
    race: Race | None = None
    heads: tuple[tuple[float, ...], ...] | None = None
    comparison: MethodComparison | None = None
    profiles: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    controls: Mapping[str, Any] | None = None
    drawn: Mapping[str, Drawn] = field(default_factory=dict)
    model_layers: tuple[int, ...] = ()

    @property
    def layer_count(self) -> int:
        """How many layers a plan is about: those that attend fully in the model itself."""
        return len(self.examples[0].scores)

    @property
    def full_layers(self) -> tuple[int, ...]:
        """Which layers of the model those are, as `layers` has them."""
        return self.model_layers or tuple(range(self.layer_count))

    def of_layer(self, layer: int) -> list[float]:
        """A layer's score on every example that it was scored on, by its place in `layers`."""
        return [s for s in (e.scores[layer] for e in self.examples) if s is not None]

    @property
    def layers(self) -> tuple[Estimate, ...]:
        """Each layer's score and standard error, in `unit`."""
        return tuple(estimate(self.of_layer(layer)) for layer in range(self.layer_count))

    @property
    def by_mean(self) -> bool:
        """Whether the layers of the best mean scores are the ones chosen."""
        by_mean = (self.full_layers[i] for i in rank(means(self.examples)))
        return self.race is not None or self.order == tuple(by_mean)

    def chosen_by(self, keep: int) -> str:
        """What chose the first `keep` layers of the order."""
        if self.comparison is not None and self.comparison.keep == keep:
            return self.comparison.winner
        return self.method

    def check_model(self, source: Source) -> None:
        """Refuse a model that this was not measured on.

        Scores of earlier versions know the weights by samples only.

        Raises:
            ScoresError: it is another model, or its weights have other bytes.
            SourceError: its files changed since it was opened.
        """
        other = partial(
            ScoresError,
            "the scores were measured on another model",
            where="--scores",
            next_step="measure this one with: hybridize calibrate SOURCE --out scores.json",
        )
        if (found := self.fingerprint.get("source")) != source.fingerprint:
            expected, got = (f"fingerprint {str(f)[:16]}..." for f in (source.fingerprint, found))
            raise other(expected=expected, got=got)
        measured = self.fingerprint.get("weights")
        if measured is not None and measured != source.weight_hashes:
            raise other(expected="the same bytes of weights", got="the same samples of them")
        if self.full_layers != source.shape.full_layers:
            raise ScoresError(
                "the scores are for a model of another depth",
                where="--scores",
                expected=f"{len(source.shape.full_layers)} layers",
                got=self.layer_count,
            )

    def check_mask(self, window: int | None, sinks: int | None, full_decode: bool | None) -> None:
        """Refuse, by a ScoresError, another mask; None is for what was not asked for."""
        for value, measured, option in (
            (window, self.mask.window_tokens, "--window"),
            (sinks, self.mask.sink_tokens, "--sinks"),
            (full_decode, self.mask.full_attention_decode, "--full-decode"),
        ):
            if value is not None and value != measured:
                raise ScoresError(
                    "the scores were measured under another mask",
                    where=option,
                    expected=measured,
                    got=value,
                    next_step="leave the option out, or calibrate under the new mask",
                )

    def check_methods(self, methods: Sequence[str]) -> None:
        """Refuse, by a ScoresError, other methods than those that were measured."""
        measured = tuple(self.fingerprint.get("methods", (self.method,)))
        if tuple(methods) != measured:
            raise ScoresError(
                "the scores were measured by another method",
                where="--method",
                expected=",".join(measured),
                got=",".join(methods),
                next_step="leave the option out, or calibrate by the new method",
            )

    def to_json(self) -> dict[str, Any]:
        """The scores as they are saved; `load_scores` reads them back."""
        return {
            "format_version": FORMAT_VERSION,
            "method": self.method,
            "unit": self.unit,
            "mask": self.mask.to_json(),
            "layers": [
                {
                    "index": self.full_layers[place],
                    "score": score.mean,
                    "stderr": score.stderr,
                    "examples": len(self.of_layer(place)),
                }
                for place, score in enumerate(self.layers)
            ],
            "order": list(self.order),
            "examples": len(self.examples),
            "nll": {
                end: asdict(estimate(values))
                for end in ("full", "sliding")
                if None not in (values := [getattr(example, end) for example in self.examples])
            },
            "layer_forwards": self.layer_forwards,
            "race": None if self.race is None else asdict(self.race),
            "heads": None if self.heads is None else [list(row) for row in self.heads],
            "contest": None if self.comparison is None else self.comparison.to_json(),
            "profiles": {kind: list(order) for kind, order in self.profiles.items()},
            "controls": None if self.controls is None else dict(self.controls),
            "fingerprint": dict(self.fingerprint),
            **({"drawn": {n: asdict(d) for n, d in self.drawn.items()}} if self.drawn else {}),
            **({"model_layers": list(self.model_layers)} if self.model_layers else {}),
            "per_example": [asdict(example) for example in self.examples],
        }


def load_scores(path: Path) -> Scores:
    """Read a scores file.

    Raises:
        ScoresError: the file is missing or is not a scores file of this version.
    """
    value = read_json_object(path, ScoresError, "hybridize calibrate SOURCE --out scores.json")
    method = value.get("method")
    if value.get("format_version") != FORMAT_VERSION or not _is_plain(method):
        raise ScoresError(
            "this is not a scores file of this version",
            where=path,
            expected=f"format_version {FORMAT_VERSION} and a method",
            got=f"format_version {value.get('format_version')}, method {method}",
        )
    try:
        examples = tuple(map(ExampleScores.from_json, value["per_example"]))
        _check_examples(examples)
        model_layers = _model_layers(value.get("model_layers", []), len(examples[0].scores))
        layers = model_layers or tuple(range(len(examples[0].scores)))
        race, comparison, heads = value["race"], value["contest"], value.get("heads")
        unit = value.get("unit", _EARLIER_UNITS.get(method, NATS))
        if not _is_plain(unit):
            raise ValueError(f"no unit: {unit!r}")
        if comparison is not None:
            comparison = MethodComparison.from_json(comparison, layers)
        return Scores(
            method=method,
            mask=Mask.from_json(value["mask"], path),
            examples=examples,
            layer_forwards=float(value["layer_forwards"]),
            fingerprint=_fingerprint(value["fingerprint"]),
            order=_order(value["order"], layers),
            unit=unit,
            race=None if race is None else Race.from_json(race, layers),
            heads=None if heads is None else _heads(heads, len(layers)),
            comparison=comparison,
            profiles={str(k): _order(v, layers) for k, v in value["profiles"].items()},
            controls=None if value.get("controls") is None else dict(value["controls"]),
            drawn={
                name: Drawn(int(value["drawn"][name]["asked"]), int(value["drawn"][name]["got"]))
                for name in ("scored", "validation")
                if name in value.get("drawn", {})
            },
            model_layers=model_layers,
        )
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, PlanError) as error:
        raise ScoresError("the scores file is damaged", where=path, got=error) from error


def _is_plain(value: object) -> TypeGuard[str]:
    """Whether it is a name that may be shown as it is; methods of other versions have one too."""
    return isinstance(value, str) and re.fullmatch(r"[\w -]{1,80}", value) is not None


def _order(value: Sequence[int], layers: Sequence[int]) -> tuple[int, ...]:
    if sorted(value) != list(layers) or any(type(layer) is not int for layer in value):
        raise ValueError(f"not an order of {len(layers)} layers: {value}")
    return tuple(value)


def _model_layers(value: object, count: int) -> tuple[int, ...]:
    """Which layers were scored; raise ValueError unless as many as said, and in order."""
    if value == []:
        return ()
    if not isinstance(value, list) or any(type(layer) is not int for layer in value):
        raise ValueError(f"no indices of layers: {value!r}")
    if len(value) != count or sorted(set(value)) != value or value[0] < 0:
        raise ValueError(f"not the indices of {count} layers: {value}")
    return tuple(value)


def _fingerprint(value: Mapping[str, Any]) -> dict[str, Any]:
    methods = value.get("methods", [])
    if not isinstance(methods, list) or not all(isinstance(name, str) for name in methods):
        raise ValueError(f"the fingerprint's methods are no names: {methods!r}")
    return dict(value)


def _heads(value: object, total: int) -> tuple[tuple[float, ...], ...]:
    """A table of gates; raise ValueError unless it has a row a layer, all of one width."""
    if not isinstance(value, list) or len(value) != total:
        raise ValueError(f"not a row of heads for each of {total} layers")
    rows = tuple(map(tuple, value))
    if len({len(row) for row in rows}) != 1 or not rows[0]:
        raise ValueError("not as many heads in each layer")
    if not all(type(gate) in (int, float) and math.isfinite(gate) for row in rows for gate in row):
        raise ValueError("a head's gate is not a finite number")
    return rows


def _check_examples(examples: Sequence[ExampleScores]) -> None:
    """Raise ValueError unless every layer has a score, and every number is one."""
    lengths = {len(example.scores) for example in examples}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"{sorted(lengths)} layers per example")
    given = [x for e in examples for x in (e.full, e.sliding, *e.scores) if x is not None]
    if not all(type(x) in (int, float) and math.isfinite(x) for x in given):
        raise ValueError("a loss is not a finite number")
    counts = [count for e in examples for count in (e.prompt_tokens, e.answer_tokens)]
    if not all(type(count) is int for count in counts):
        raise ValueError("a number of tokens is not a whole number")
    if not all(isinstance(example.kind, str) for example in examples):
        raise ValueError("the kind of an example is not a text")
    for layer, column in enumerate(zip(*(example.scores for example in examples), strict=True)):
        if set(column) == {None}:
            raise ValueError(f"layer {layer} has no score")
