"""A plan: which layers keep full attention, under which mask, and why."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from converter.common.errors import PlanError
from converter.common.files import read_json_object
from converter.model.dimensions import ModelDimensions
from converter.model.mask import (
    FULL,
    LINEAR,
    MIXED,
    OWN_SLIDING,
    SLIDING,
    Mask,
    full_kv_heads,
    has_mixed,
)
from converter.plan.units import Units

FORMAT_VERSION = 1
# What a plan gives the layers that it is about, as the strip shows it.
_MARKS = {FULL: "█", MIXED: "▒", SLIDING: "·"}


@dataclass(frozen=True)
class Plan:
    """Layer kinds, the mask, and where they came from.

    Attributes:
        layer_types: for each layer `full_attention` or `sliding_attention`, or which of its KV
            heads attend fully; or, where the model's own layer does not, what it is (`mask.py`).
        mask: what the sliding layers see.
        method: the selector that chose the layers, or `hand` when the user named them.
        budget: the budget as the user wrote it, or None when the user named the layers.
        ranking: the layers that may slide, the one most worth full attention first; None without a
            ranking. Where a layer is mixed these are KV heads, by the numbers of `units.py`.
        source: the model the plan was made for (folder name or Hub id).
        revision: the source's commit, when it came from the Hub.
        profiles: further plans under the same mask, as their full-attention layers, by name.
    """

    layer_types: tuple[str, ...]
    mask: Mask
    method: str
    budget: str | None
    ranking: tuple[int, ...] | None
    source: str
    revision: str | None
    profiles: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def full_attention_layers(self) -> tuple[int, ...]:
        """Indices of the layers that keep full attention as a whole, ascending."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == FULL)

    @property
    def is_mixed(self) -> bool:
        """Whether some layer has KV heads that attend fully beside others that slide."""
        return has_mixed(self.layer_types)

    def full_kv_heads(self, kv_heads: int) -> tuple[tuple[int, ...], ...]:
        """The KV heads of every layer that attend fully."""
        return tuple(full_kv_heads(kind, kv_heads) for kind in self.layer_types)

    def full_layers(self, kv_heads: int) -> Fraction:
        """How many layers' KV heads attend fully."""
        return Fraction(sum(map(len, self.full_kv_heads(kv_heads))), kv_heads)

    @property
    def strip(self) -> str:
        """The layers in fours: `█` full, `▒` mixed, `·` sliding, `-` as in the model itself."""
        marks = "".join(_MARKS.get(kind.partition(":")[0], "-") for kind in self.layer_types)
        return " ".join(marks[i : i + 4] for i in range(0, len(marks), 4))

    def units_in_full(self, units: Units) -> tuple[int, ...]:
        """The layers, or KV heads, that attend fully, by their numbers in the model, ascending."""
        if not units.of_heads:
            return self.full_attention_layers
        heads = self.full_kv_heads(units.per_layer)
        return tuple(i * units.per_layer + head for i, row in enumerate(heads) for head in row)

    def head_strips(self, kv_heads: int) -> list[str]:
        """The KV heads at a glance: a strip of the layers, as above, for each."""
        every = zip(self.layer_types, self.full_kv_heads(kv_heads), strict=True)
        columns = [
            ["█" if head in full else "·" for head in range(kv_heads)]
            if kind.partition(":")[0] in _MARKS
            else ["-"] * kv_heads
            for kind, full in every
        ]
        strips = ("".join(marks) for marks in zip(*columns, strict=True))
        return [" ".join(marks[i : i + 4] for i in range(0, len(marks), 4)) for marks in strips]

    def check_depth(self, layers: int, where: object) -> None:
        """Refuse, with a PlanError, a plan for a model of another number of layers."""
        if len(self.layer_types) != layers:
            raise PlanError(
                "the plan is for a model of another depth",
                where=where,
                expected=f"{layers} layers",
                got=len(self.layer_types),
            )

    def check_layers(self, shape: ModelDimensions, where: object) -> None:
        """Refuse, with a PlanError, a plan for a model whose layers are others."""
        self.check_depth(shape.layers, where)
        if model_kinds(self.layer_types) != shape.layer_kinds:
            raise PlanError(
                "the plan is for a model with other kinds of layers",
                where=where,
                expected=f"{FULL} or {SLIDING} in layers {', '.join(map(str, shape.full_layers))}",
                got=self.strip,
            )
        try:
            self.full_kv_heads(shape.kv_heads)
        except ValueError as error:
            raise PlanError(
                "the plan is for a model with other KV heads",
                where=where,
                expected=f"KV heads 0 to {shape.kv_heads - 1} of a layer",
                got=error,
            ) from error
        units = Units(len(shape.full_layers), shape.kv_heads if self.is_mixed else 1)
        if self.ranking and sorted(self.ranking) != sorted(units.of_layers(shape.full_layers)):
            raise PlanError(
                "the plan's ranking is not one of this model",
                where=where,
                expected=f"{units.total} {units}",
                got=len(self.ranking),
            )

    def offering(self, profiles: Mapping[str, Plan]) -> Plan:
        """This plan with others that are offered by name.

        Raises:
            PlanError: another plan has another mask, of which a checkpoint has one, or is one of KV
                heads; profiles are of layers.
        """
        for name, profile in profiles.items():
            if profile.is_mixed:
                raise PlanError(
                    "a profile is a plan of whole layers",
                    where=f"--profile {name}",
                    got="a layer of which some KV heads slide",
                )
            if profile.mask != self.mask:
                raise PlanError(
                    "a profile has another mask than the plan",
                    where=f"--profile {name}",
                    expected=self.mask,
                    got=profile.mask,
                )
        layers = {name: profile.full_attention_layers for name, profile in profiles.items()}
        return replace(self, profiles={**self.profiles, **layers})

    def to_json(self) -> dict[str, Any]:
        """The plan as it is saved; `from_json` reads it back."""
        return {
            "format_version": FORMAT_VERSION,
            "layer_types": list(self.layer_types),
            "full_attention_layers": list(self.full_attention_layers),
            "mask": self.mask.to_json(),
            "method": self.method,
            "budget": self.budget,
            "ranking": None if self.ranking is None else list(self.ranking),
            "source": self.source,
            "revision": self.revision,
            "profiles": {name: list(layers) for name, layers in self.profiles.items()},
        }


def model_kinds(layer_types: Iterable[str]) -> tuple[str, ...]:
    """What the layers of a plan are in the model itself."""
    return tuple(FULL if kind.partition(":")[0] in _MARKS else kind for kind in layer_types)


def _planned(kinds: Sequence[str]) -> list[int]:
    """The layers that a plan is about."""
    return [i for i, kind in enumerate(kinds) if kind in _MARKS]


def _is_kind(kind: object) -> bool:
    """Whether it is spelled as the kind of a layer; a model says which KV heads it has."""
    known = (FULL, SLIDING, LINEAR, OWN_SLIDING)
    return kind in known or (
        isinstance(kind, str)
        and re.fullmatch(rf"{MIXED}:\d{{1,4}}(,\d{{1,4}}){{0,999}}", kind) is not None
    )


def layer_types_of(
    full_attention_layers: Iterable[int], total: int, kinds: Sequence[str] = ()
) -> tuple[str, ...]:
    """Layer kinds from the indices that keep full attention.

    Args:
        full_attention_layers: those of the model's full layers that do not slide.
        total: how many layers there are.
        kinds: what each is in the model itself; empty where all attend fully.

    Raises:
        PlanError: an index is outside 0 to total - 1, is named twice, or is of a layer that does
            not attend fully in the model itself.
    """
    wanted, where = list(full_attention_layers), "full_attention_layers (--layers)"
    kinds = kinds or (FULL,) * total
    for index in wanted:
        if not 0 <= index < total:
            known = f"0 to {total - 1}"
            raise PlanError("the model has no such layer", where=where, expected=known, got=index)
    if len(set(wanted)) != len(wanted):
        raise PlanError("a layer is named twice", where=where, got=wanted)
    if other := [index for index in wanted if kinds[index] != FULL]:
        raise PlanError(
            "a layer does not attend fully in the model itself, so it stays as it is",
            where=where,
            expected="of " + ", ".join(str(i) for i, kind in enumerate(kinds) if kind == FULL),
            got=", ".join(f"{index} ({kinds[index]})" for index in other),
        )
    kept = set(wanted)
    return tuple(
        SLIDING if kind == FULL and i not in kept else kind for i, kind in enumerate(kinds)
    )


def kinds_of_units(full: Iterable[int], shape: ModelDimensions, units: Units) -> tuple[str, ...]:
    """Layer kinds from the units, by their numbers in the model, that keep full attention."""
    kinds = replace(units, layers=shape.layers).types(full)
    return tuple(
        kind if own == FULL else own for kind, own in zip(kinds, shape.layer_kinds, strict=True)
    )


def cache_bytes(
    full_layers: int | Fraction, mask: Mask, shape: ModelDimensions, context_tokens: int
) -> int:
    """Bytes cached for one sequence when so many layers, or as many KV heads, are full.

    A sliding layer holds the window and the sinks, unless generated rows attend to everything:
    then nothing may be dropped. What the model's other layers keep counts too.
    """
    slides = min(context_tokens, mask.window_tokens + mask.sink_tokens)
    held = context_tokens if mask.full_attention_decode else slides
    sliding_layers = len(shape.full_layers) - full_layers
    tokens = full_layers * context_tokens + sliding_layers * held
    return int(tokens * shape.kv_bytes_per_token) + shape.other_cache_bytes(context_tokens)


def kv_bytes(plan: Plan, shape: ModelDimensions, context_tokens: int) -> dict[str, int]:
    """Bytes of keys and values cached for one sequence, full and under the plan."""
    full_layers = plan.full_layers(shape.kv_heads)
    return {
        "full": cache_bytes(len(shape.full_layers), plan.mask, shape, context_tokens),
        "hybrid": cache_bytes(full_layers, plan.mask, shape, context_tokens),
        "context_tokens": context_tokens,
    }


def load_plan(path: Path) -> Plan:
    """Read a plan file.

    Raises:
        PlanError: the file is missing, is no plan, or contradicts itself.
    """
    value = read_json_object(path, PlanError, "hybridize plan SOURCE --budget 1/4 --out plan.json")
    return plan_from_json(value, path)


def plan_from_json(value: Mapping[str, Any], where: object) -> Plan:
    """Read what `Plan.to_json` wrote; keys added to it (such as `kv_bytes`) are passed over.

    Raises:
        PlanError: a field is missing, of another type, or contradicts another.
    """

    def broken(problem: str, expected: str, got: object) -> PlanError:
        return PlanError(problem, where=where, expected=expected, got=repr(got))

    version, kinds = value.get("format_version"), value.get("layer_types")
    if version != FORMAT_VERSION:
        wanted = f"format_version {FORMAT_VERSION}"
        raise broken("this is not a plan of this version", wanted, version)
    if not isinstance(kinds, list) or not kinds or not all(map(_is_kind, kinds)):
        raise broken("the plan's layer_types cannot be used", f"{FULL} or {SLIDING} each", kinds)
    full = [i for i, kind in enumerate(kinds) if kind == FULL]
    told, ranking = value.get("full_attention_layers"), value.get("ranking")
    if told != full:
        problem = "the plan contradicts itself: full_attention_layers is not what layer_types says"
        raise broken(problem, str(full), told)
    if ranking is not None and (
        not isinstance(ranking, list)
        or any(type(index) is not int for index in ranking)
        or (not has_mixed(kinds) and sorted(ranking) != _planned(kinds))
        or len(set(ranking)) != len(ranking)
    ):
        problem = "the plan's ranking is not an order of the layers"
        raise broken(problem, "every index once", ranking)
    for key in ("method", "source"):
        if not isinstance(value.get(key), str):
            raise broken(f"the plan has no {key}", "a string", value.get(key))
    for key in ("budget", "revision"):
        if not isinstance(value.get(key), str | None):
            raise broken(f"the plan's {key} cannot be used", "a string or null", value.get(key))
    profiles = value.get("profiles", {})
    if not isinstance(profiles, dict) or not all(
        isinstance(layers, list) and all(type(layer) is int for layer in layers)
        for layers in profiles.values()
    ):
        raise broken("the plan's profiles cannot be used", "lists of layers by name", profiles)
    for layers in profiles.values():
        layer_types_of(layers, len(kinds), model_kinds(kinds))
    return Plan(
        profiles={name: tuple(layers) for name, layers in profiles.items()},
        layer_types=tuple(kinds),
        mask=Mask.from_json(value.get("mask"), where),
        method=value["method"],
        budget=value.get("budget"),
        ranking=None if ranking is None else tuple(ranking),
        source=value["source"],
        revision=value.get("revision"),
    )
