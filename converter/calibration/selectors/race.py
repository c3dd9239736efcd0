"""Racing: stop scoring a layer as soon as its side of the budget's boundary is clear.

Layers are scored on growing rounds of examples. All layers still open have been scored on the same
examples, so they are compared by paired differences. A layer is accepted when it is clearly better
than every layer that would be left out, and rejected when it is clearly worse than every layer that
would be kept (a race in the sense of Maron and Moore, 1993, for the best K).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum, sqrt
from typing import Any

from converter.calibration.selectors.base import rank

_FIRST_ROUND = 16
# Probability, over all comparisons of a race, of one wrong decision.
_ERROR = 0.05


@dataclass(frozen=True)
class Race:
    """What a race decided.

    Attributes:
        keep: how many layers were to be chosen.
        accepted: layers that clearly belong to the best `keep`.
        rejected: layers that clearly do not.
        screened: layers, accepted or rejected, that were decided by their first-order score alone.
        rounds: examples scored and layers scored on them, round by round.
    """

    keep: int
    accepted: tuple[int, ...] = ()
    rejected: tuple[int, ...] = ()
    screened: tuple[int, ...] = ()
    rounds: tuple[tuple[int, int], ...] = ()

    def open_layers(self, total: int) -> tuple[int, ...]:
        """Layers not decided yet, in order; none once their places are all given away."""
        decided = {*self.accepted, *self.rejected}
        left = tuple(layer for layer in range(total) if layer not in decided)
        return () if len(self.accepted) in (self.keep, self.keep - len(left)) else left

    def place(self, layer: int) -> int:
        """0 for an accepted layer, 1 for an open one, 2 for a rejected one."""
        return 0 if layer in self.accepted else 2 if layer in self.rejected else 1

    @classmethod
    def from_json(cls, value: Mapping[str, Any], total: int) -> Race:
        """Read what `dataclasses.asdict` gave.

        Raises:
            KeyError, TypeError, ValueError: it is no race of a model of `total` layers.
        """
        decided = {name: tuple(value[name]) for name in ("accepted", "rejected", "screened")}
        layers = [layer for name in ("accepted", "rejected") for layer in decided[name]]
        if len(set(layers)) != len(layers) or not set(layers) <= set(range(total)):
            raise ValueError("the race decides layers twice, or layers that are not there")
        rounds = tuple((int(examples), int(layers)) for examples, layers in value["rounds"])
        return cls(keep=int(value["keep"]), rounds=rounds, **decided)


def round_ends(examples: int) -> tuple[int, ...]:
    """How many examples have been scored after each round: 16, then twice as many, then all."""
    ends = [min(_FIRST_ROUND, examples)]
    while ends[-1] < examples:
        ends.append(min(2 * ends[-1], examples))
    return tuple(ends)


def after_round(
    race: Race, scores: Mapping[int, Sequence[float]], rounds: int, new_examples: int
) -> Race:
    """Decide what a finished round makes clear.

    Args:
        race: before the round.
        scores: of each open layer, on every example so far.
        rounds: how many rounds there may be.
        new_examples: how many examples the round added.
    """
    layers = sorted(scores)
    order = [layers[place] for place in rank([fsum(scores[layer]) for layer in layers])]
    slots = race.keep - len(race.accepted)
    inside, outside = order[:slots], order[slots:]
    # Student's t for the mean of paired differences; the error is shared by all comparisons.
    level = 1 - _ERROR / (rounds * max(1, len(inside) * len(outside)))
    clear = {
        (i, j): _clearly_positive([a - b for a, b in zip(scores[i], scores[j], strict=True)], level)
        for i in inside
        for j in outside
    }
    accepted = [i for i in inside if all(clear[i, j] for j in outside)]
    rejected = [j for j in outside if all(clear[i, j] for i in inside)]
    return Race(
        keep=race.keep,
        accepted=(*race.accepted, *sorted(accepted)),
        rejected=(*race.rejected, *sorted(rejected)),
        screened=race.screened,
        rounds=(*race.rounds, (new_examples, len(layers))),
    )


def _clearly_positive(differences: Sequence[float], level: float) -> bool:
    """Whether the mean is above 0 with the given confidence."""
    from scipy.stats import t

    count = len(differences)
    if count < 2:
        return False
    mean = fsum(differences) / count
    deviation = sqrt(fsum((d - mean) ** 2 for d in differences) / (count - 1))
    return mean > float(t.ppf(level, count - 1)) * deviation / sqrt(count)


def screened_race(scores: Sequence[float], keep: int) -> Race:
    """A race that only the layers near the boundary of a first-order ranking take part in.

    An eighth of the layers on either side of the boundary, at least two, are left open.
    """
    margin = max(2, len(scores) // 8)
    order = rank(scores)
    accepted = tuple(sorted(order[: max(0, keep - margin)]))
    rejected = tuple(sorted(order[keep + margin :]))
    return Race(keep, accepted, rejected, screened=tuple(sorted((*accepted, *rejected))))
