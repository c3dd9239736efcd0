"""Racing: stop scoring a layer as soon as its side of the budget's boundary is clear.

Layers are scored on growing rounds of examples. All layers still open have been scored on the same
examples, so they are compared by paired differences. A layer is accepted when it is clearly better
than every layer that would be left out, and rejected when it is clearly worse than every layer that
would be kept (a race in the sense of Maron and Moore, 1993, for the best K).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum

from converter.calibration.scores import Race, rank
from converter.common.statistics import estimate, t_tail

_FIRST_ROUND = 16
# Probability, over all comparisons of a race, of one wrong decision.
RACE_ERROR = 0.05


def round_ends(examples: int) -> tuple[int, ...]:
    """How many examples have been scored after each round: 16, then twice as many, then all."""
    ends = [min(_FIRST_ROUND, examples)]
    while ends[-1] < examples:
        ends.append(min(2 * ends[-1], examples))
    return tuple(ends)


def after_round(
    race: Race, scores: Mapping[int, Sequence[float]], rounds: int, new_examples: int
) -> Race:
    """Decide what a finished round, of `new_examples`, makes clear.

    Args:
        race: before the round.
        scores: of each open layer, on every example so far.
        rounds: how many rounds there may be.
    """
    layers = sorted(scores)
    order = [layers[i] for i in rank([fsum(scores[layer]) for layer in layers])]
    slots = race.keep - len(race.accepted)
    inside, outside = order[:slots], order[slots:]
    # Student's t for the mean of paired differences; the error is shared by all comparisons.
    level = 1 - RACE_ERROR / (rounds * max(1, len(inside) * len(outside)))
    clear = {
        (i, j): clearly_positive([a - b for a, b in zip(scores[i], scores[j], strict=True)], level)
        for i in inside
        for j in outside
    }
    accepted = [i for i in inside if all(clear[i, j] for j in outside)]
    rejected = [j for j in outside if all(clear[i, j] for i in inside)]
    return Race(
        keep=race.keep,
        accepted=(*race.accepted, *sorted(accepted)),
        rejected=(*race.rejected, *sorted(rejected)),
        rounds=(*race.rounds, (new_examples, len(layers))),
    )


def clearly_positive(differences: Sequence[float], level: float) -> bool:
    """Whether the mean is above 0 with the given confidence (one-sided t test)."""
    found = estimate(differences)
    if found.stderr is None or found.mean <= 0:
        return False
    if found.stderr == 0:
        return True
    return t_tail(found.mean / found.stderr, len(differences) - 1) < 1 - level
