"""The loss that gates are learned from: a model's, on a few examples a step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import fsum
from typing import TYPE_CHECKING

from converter.forward.gradient import GateGradients, Gates

if TYPE_CHECKING:
    import torch

    from converter.data import Example
    from converter.forward.meter import Advance, Meter


class ExamplesOracle:
    """The mean loss of examples, as an `Oracle`.

    Args:
        meter: the model.
        examples: to draw from.
        batch: how many to draw for a step; at most all.
        group: how many to give the model at a time.
        seed: of the draws.
        hidden: whether the loss is the mean squared difference of what the output head reads from
            what it reads in the full-attention model; else it is the answer's NLL.
        advance: told how many layer-forwards have been done.
    """

    def __init__(
        self,
        meter: Meter,
        examples: Sequence[Example],
        *,
        batch: int,
        group: int,
        seed: int,
        hidden: bool,
        advance: Advance,
    ) -> None:
        self._meter = meter
        self._examples = examples
        self._batch = min(batch, len(examples))
        self._group = group
        self._seed = seed
        self._hidden = hidden
        self._advance = advance
        # What the head reads in the full model, by the example's place: found when it is drawn.
        self._targets: dict[int, torch.Tensor] = {}

    def __call__(self, step: int, gates: Gates) -> GateGradients:
        """The mean over the examples of a step."""
        generator = random.Random(f"{self._seed} {step}")  # noqa: S311 - reproducible
        drawn = generator.sample(range(len(self._examples)), self._batch)
        found: list[GateGradients] = []
        for start in range(0, len(drawn), self._group):
            places = drawn[start : start + self._group]
            examples = [self._examples[place] for place in places]
            targets = self._full_states(places) if self._hidden else None
            found += self._meter.gate_gradients(examples, gates, self._advance, targets)
        return _mean(found)

    def _full_states(self, places: Sequence[int]) -> list[torch.Tensor]:
        missing = [place for place in places if place not in self._targets]
        if missing:
            examples = [self._examples[place] for place in missing]
            states = self._meter.full_states(examples, self._advance)
            self._targets.update(zip(missing, states, strict=True))
        return [self._targets[place] for place in places]


def _mean(found: Sequence[GateGradients]) -> GateGradients:
    by_gate = tuple(
        tuple(fsum(slopes) / len(found) for slopes in zip(*rows, strict=True))
        for rows in zip(*(one.by_gate for one in found), strict=True)
    )
    return GateGradients(fsum(one.loss for one in found) / len(found), by_gate)
