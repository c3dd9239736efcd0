"""What a way of choosing layers has to say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from converter.calibration.scores import NATS, ExampleScores, Race
from converter.inference.positions import TokenSpans
from converter.model.mask import Mask
from converter.plan.units import LAYER, Units

if TYPE_CHECKING:
    from converter.calibration.evaluator import PlanEvaluator


@dataclass(frozen=True)
class Choice:
    """What a selector says.

    Attributes:
        order: every unit, the one to keep first; a plan keeps as many as its budget allows.
        examples: what each example says of each unit; none where nothing was measured.
        race: how scoring was cut short; None when every layer was scored on every example.
        heads: a gate for each KV head of every layer, higher for one that deserves full attention
            more; None where heads were not told apart.
    """

    order: tuple[int, ...]
    examples: tuple[ExampleScores, ...]
    race: Race | None = None
    heads: tuple[tuple[float, ...], ...] | None = None

    def among(self, units: Sequence[int]) -> Choice:
        """The choice in a model whose units that a plan is about are these, from 0 on here."""
        race = None if self.race is None else self.race.among(units)
        return replace(self, order=tuple(units[i] for i in self.order), race=race)

    def spread(self, units: Units) -> Choice:
        """A choice of layers as one of the KV heads in them, each with its layer's score."""
        width = units.per_layer
        examples = tuple(
            replace(one, scores=tuple(score for score in one.scores for _ in range(width)))
            for one in self.examples
        )
        return Choice(units.of_layers(self.order), examples)


@dataclass(frozen=True)
class Selector(ABC):
    """A way to choose the layers, or KV heads, that keep full attention.

    Attributes:
        name: what `--method` calls it.
        summary: one line for help, cards and documentation.
        measures: whether it runs the model.
        needs_gradients: whether it takes as much memory as gradients do.
        nested: whether the front of its order, at any length, is what it would choose for that
            length, or close to it: then one order serves every budget.
        sums_to_gap: whether its scores should sum to what all full is below all sliding.
        most_examples: it reads no more than so many, the first ones; None for all.
        granularity: what it chooses, `layer` or `kv-head`.
        tells_heads: whether it can choose KV heads.
    """

    name: str
    summary: str
    unit: str = NATS
    measures: bool = True
    needs_gradients: bool = False
    nested: bool = True
    sums_to_gap: bool = False
    most_examples: int | None = None
    granularity: str = LAYER
    tells_heads: bool = True

    @property
    def label(self) -> str:
        """What its choice is called in results."""
        return self.name if self.granularity == LAYER else f"{self.name} of KV heads"

    @abstractmethod
    def choose(self, evaluator: PlanEvaluator, keep: int) -> Choice:
        """Order the units by what the evaluator finds, for a plan that keeps so many."""

    @abstractmethod
    def cost(self, spans: TokenSpans, mask: Mask, units: Units, keep: int) -> float:
        """What choosing `keep` of the units may cost for one example, in layer-forwards."""
