"""How many layers of an order are enough for a loss to stay within a bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from converter.calibration.search.oracle import Candidate, Losses, measure


@dataclass(frozen=True)
class Smallest:
    """The smallest prefix found of an order of layers whose loss is within the bound.

    Attributes:
        found: the prefix and its loss.
        full: all layers and their loss, which the bound is counted from.
        measured: everything measured on the way, by count.
    """

    found: Candidate
    full: Candidate
    measured: tuple[Candidate, ...]


def smallest_within(losses: Losses, order: Sequence[int], bound: float) -> Smallest:
    """The smallest prefix of an order whose loss is at most `bound` above that of all layers.

    By bisection, which assumes that losses fall along the order. Whether they do or not, the prefix
    returned has been measured and is within the bound, and the prefix one layer shorter, if there
    is one, has been measured and is not. Where losses do not fall, a shorter one may be as well.

    Args:
        losses: the oracle.
        order: every layer, the most important one first.
        bound: in nats per answer token.

    Raises:
        ValueError: the bound is negative or not a number.
    """
    if not bound >= 0:
        raise ValueError(f"a bound of {bound} nats leaves out the model with all layers")
    none, full = measure(losses, [frozenset(), frozenset(order)])
    known = {0: none, len(order): full}

    def within(count: int) -> bool:
        if count not in known:
            known[count] = measure(losses, [frozenset(order[:count])])[0]
        return known[count].loss <= full.loss + bound

    # Of these two counts the first is too few and the second enough.
    few, enough = (-1, 0) if within(0) else (0, len(order))
    while enough - few > 1:
        middle = (few + enough) // 2
        if within(middle):
            enough = middle
        else:
            few = middle
    return Smallest(known[enough], full, tuple(known[count] for count in sorted(known)))
