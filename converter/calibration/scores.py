"""Scores: what each layer's attention is worth, example by example, with its error."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from converter.calibration.results import MethodComparison
from converter.common.errors import ScoresError
from converter.common.statistics import Estimate, estimate
from converter.model.mask import Mask

if TYPE_CHECKING:
    from converter.model.source import Source
from converter.plan.budget import Budget
from converter.plan.plan import Plan, kinds_of_units
from converter.plan.units import KV_HEAD, LAYER, Units, units_of

FORMAT_VERSION = 3
NATS = "nats per answer token"


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
        layer_forwards: decoder layers run to choose and to compare, in runs over one whole example.
        fingerprint: everything the scores depend on.
        order: every unit that a plan is about, layer or KV head, the one to keep first.
        model_units: the numbers of those in the model, lowest first, as each example's scores have
            them; empty where they are all.
        kv_heads: of each layer, where they were told apart; 1 where layers were scored.
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
    model_units: tuple[int, ...] = ()
    kv_heads: int = 1

    @property
    def units(self) -> Units:
        """What a plan decides: layers that attend fully in the model itself, or their KV heads."""
        return Units(len(self.examples[0].scores) // self.kv_heads, self.kv_heads)

    @property
    def granularity(self) -> str:
        """Whether layers were scored or KV heads, as `--granularity` has it."""
        return KV_HEAD if self.units.of_heads else LAYER

    @property
    def numbers(self) -> tuple[int, ...]:
        """Which units of the model those are, as `means` has them."""
        return self.model_units or tuple(range(self.units.total))

    def of_unit(self, place: int) -> list[float]:
        """A unit's score on every example that it was scored on, by its place in `estimates`."""
        return [s for s in (e.scores[place] for e in self.examples) if s is not None]

    @property
    def estimates(self) -> tuple[Estimate, ...]:
        """Each unit's score and standard error, in `unit`."""
        return tuple(estimate(self.of_unit(place)) for place in range(self.units.total))

    @property
    def by_mean(self) -> bool:
        """Whether the layers of the best mean scores are the ones chosen."""
        by_mean = (self.numbers[i] for i in rank(means(self.examples)))
        return self.race is not None or self.order == tuple(by_mean)

    @property
    def layer_order(self) -> tuple[int, ...]:
        """The order as one of layers, each by the first of its KV heads."""
        return tuple(dict.fromkeys(unit // self.kv_heads for unit in self.order))

    def front(self, keep: int) -> tuple[int, ...]:
        """What a plan of `keep` units keeps: whole layers, where those won, may be a few less."""
        compared = self.comparison
        if compared is not None and compared.keep == keep:
            keep = len(compared.entry(compared.winner).outcome.full)
        return self.order[:keep]

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
        shape = source.shape
        units = units_of(self.granularity, shape)
        if self.units != units or self.numbers != units.of_layers(shape.full_layers):
            raise ScoresError(
                "the scores are for a model of another depth",
                where="--scores",
                expected=f"{units.total} {units}",
                got=self.units.total,
            )

    def check_granularity(self, granularity: str | None) -> None:
        """Refuse, by a ScoresError, another granularity; None is for what was not asked for."""
        if granularity not in (None, self.granularity):
            wrong = "are of another granularity", "--granularity", "with it"
            raise _other_than_measured(*wrong, self.granularity, granularity)

    def check_mask(self, window: int | None, sinks: int | None, full_decode: bool | None) -> None:
        """Refuse, by a ScoresError, another mask; None is for what was not asked for."""
        for value, measured, option in (
            (window, self.mask.window_tokens, "--window"),
            (sinks, self.mask.sink_tokens, "--sinks"),
            (full_decode, self.mask.full_attention_decode, "--full-decode"),
        ):
            if value is not None and value != measured:
                wrong = "were measured under another mask", option, "under the new mask"
                raise _other_than_measured(*wrong, measured, value)

    def check_methods(self, methods: Sequence[str]) -> None:
        """Refuse, by a ScoresError, other methods than those that were measured."""
        measured = tuple(self.fingerprint.get("methods", (self.method,)))
        if tuple(methods) != measured:
            wrong = "were measured by another method", "--method", "by the new method"
            raise _other_than_measured(*wrong, ",".join(measured), ",".join(methods))

    def to_json(self) -> dict[str, Any]:
        """The scores as they are saved; `load_scores` reads them back."""
        return {
            "format_version": FORMAT_VERSION,
            "method": self.method,
            "unit": self.unit,
            "mask": self.mask.to_json(),
            "layers": [
                {
                    **self._number(place),
                    "score": score.mean,
                    "stderr": score.stderr,
                    "examples": len(self.of_unit(place)),
                }
                for place, score in enumerate(self.estimates)
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
            **({"model_layers": list(self.model_units)} if self.model_units else {}),
            **({"kv_heads": self.kv_heads} if self.units.of_heads else {}),
            "per_example": [asdict(example) for example in self.examples],
        }

    def _number(self, place: int) -> dict[str, int]:
        """What a unit is called in a file."""
        number = self.numbers[place]
        if not self.units.of_heads:
            return {"index": number}
        return {"index": number // self.kv_heads, "kv_head": number % self.kv_heads}


def _other_than_measured(
    problem: str, option: str, anew: str, measured: object, asked: object
) -> ScoresError:
    return ScoresError(
        f"the scores {problem}",
        where=option,
        expected=measured,
        got=asked,
        next_step=f"leave the option out, or calibrate {anew}",
    )


def plan_of_scores(source: Source, scores: Scores, budget: Budget, count: int | None) -> Plan:
    """The plan that the front of the scores' order makes; of `count` units, where that is known.

    Raises:
        PlanError: the model cannot meet the budget.
    """
    shape = source.shape
    if count is None:
        count = budget.count(scores.units, shape, scores.mask)
    plan = Plan(
        layer_types=kinds_of_units(scores.front(count), shape, scores.units),
        mask=scores.mask,
        method=scores.chosen_by(count),
        budget=str(budget),
        ranking=scores.order,
        source=source.name,
        revision=source.revision,
        profiles={kind: tuple(sorted(o[:count])) for kind, o in scores.profiles.items()},
    )
    # Where no layer is mixed it is a plan of layers to every engine.
    return plan if plan.is_mixed else replace(plan, ranking=scores.layer_order)
