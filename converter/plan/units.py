"""What a plan decides one by one: whole layers, or the KV heads of layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from converter.common.errors import PlanError
from converter.model.dimensions import ModelDimensions
from converter.model.mask import FULL, kind_of_heads

LAYER, KV_HEAD = "layer", "kv-head"
GRANULARITIES = (LAYER, KV_HEAD)


@dataclass(frozen=True)
class Units:
    """Layers, or KV heads with the query heads that share them, that attend fully or slide.

    They are numbered from 0; KV head h of layer l has the number l * per_layer + h.

    Attributes:
        layers: how many layers a plan is about: those that attend fully in the model itself.
        per_layer: KV heads of each that are told apart; 1 where layers are decided as a whole.
    """

    layers: int
    per_layer: int = 1

    @property
    def total(self) -> int:
        """How many there are."""
        return self.layers * self.per_layer

    @property
    def of_heads(self) -> bool:
        """Whether KV heads are told apart."""
        return self.per_layer > 1

    def __str__(self) -> str:
        return "KV heads" if self.of_heads else "layers"

    def types(self, full: Iterable[int]) -> tuple[str, ...]:
        """The kind of every layer that a plan is about when these units attend fully."""
        kept: dict[int, list[int]] = {}
        for unit in full:
            kept.setdefault(unit // self.per_layer, []).append(unit % self.per_layer)
        return tuple(kind_of_heads(kept.get(i, ()), self.per_layer) for i in range(self.layers))

    def of_layers(self, layers: Iterable[int]) -> tuple[int, ...]:
        """All units of some layers, in the order of these."""
        width = self.per_layer
        return tuple(layer * width + head for layer in layers for head in range(width))

    def are_whole_layers(self, full: Iterable[int]) -> bool:
        """Whether no layer has units that attend fully beside others that slide."""
        kept = set(full)
        return kept == set(self.of_layers({unit // self.per_layer for unit in kept}))

    def rows(self, values: Sequence[float]) -> tuple[tuple[float, ...], ...]:
        """A value for each unit, as a row for each layer."""
        width = self.per_layer
        return tuple(tuple(values[i : i + width]) for i in range(0, self.total, width))

    def told(self, full: Iterable[int]) -> str:
        """Units in words: `0, 4`, or `0:1,3 4` for KV heads 1 and 3 of layer 0, and layer 4."""
        if not self.of_heads:
            return ", ".join(map(str, full)) or "none"
        rows: dict[int, list[int]] = {}
        for unit in sorted(full):
            rows.setdefault(unit // self.per_layer, []).append(unit % self.per_layer)
        told = (
            f"{layer}" if len(heads) == self.per_layer else f"{layer}:{','.join(map(str, heads))}"
            for layer, heads in rows.items()
        )
        return " ".join(told) or "none"


def units_of(granularity: str, shape: ModelDimensions) -> Units:
    """What plans of a granularity decide in a model.

    Raises:
        PlanError: the model has one KV head in each layer, so there is nothing to tell apart.
    """
    if granularity == KV_HEAD and shape.kv_heads == 1:
        raise PlanError(
            "the model has one KV head in each layer, so plans of KV heads are plans of layers",
            where="--granularity",
            expected=LAYER,
            got=granularity,
        )
    per_layer = shape.kv_heads if granularity == KV_HEAD else 1
    return Units(len(shape.full_layers), per_layer)


def switched_plans(others: str, units: Units, switched: Iterable[int]) -> list[tuple[str, ...]]:
    """Layer types of a uniform plan, and with each of some units switched to the other kind."""
    uniform = frozenset(range(units.total)) if others == FULL else frozenset()
    return [units.types(uniform), *(units.types(uniform ^ {unit}) for unit in switched)]
