"""What a search asks: the loss of a model whose attention is full in a set of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isnan

# The mean answer loss of each set of full-attention layers, in nats per token; lower is better. It
# is exact and always the same for a set. Who gives it remembers it, so that asking again is free;
# asking for many sets in one call is much cheaper than for one after another.
Losses = Callable[[Sequence[frozenset[int]]], Sequence[float]]

# The same over the first so many examples.
PartialLosses = Callable[[Sequence[frozenset[int]], int], Sequence[float]]


@dataclass(frozen=True)
class Candidate:
    """A set of full-attention layers and its loss, true or foretold, in nats per answer token."""

    layers: frozenset[int]
    loss: float


def measure(losses: Losses, sets: Iterable[frozenset[int]]) -> list[Candidate]:
    """The losses of sets, asked for in one call, each set once; in the order of the sets.

    Raises:
        ValueError: a loss is not a number, or there are not as many as sets.
    """
    asked = list(dict.fromkeys(sets))
    if not asked:
        return []
    measured = [Candidate(s, float(x)) for s, x in zip(asked, losses(asked), strict=True)]
    for one in measured:
        if isnan(one.loss):
            raise ValueError(f"the loss of {sorted(one.layers)} is not a number")
    return measured


def by_loss(measured: Iterable[Candidate]) -> list[Candidate]:
    """Ascending by loss; of equal ones, the set whose sorted layers come first goes first."""
    return sorted(measured, key=lambda one: (one.loss, sorted(one.layers)))


def check_one_size(sets: Iterable[frozenset[int]]) -> None:
    """Raise ValueError unless there are sets and all are of one size."""
    sizes = {len(layers) for layers in sets}
    if len(sizes) != 1:
        raise ValueError(f"the sets to start from must have one size, and have {sorted(sizes)}")


def swapped(layers: frozenset[int], out: int, into: int) -> frozenset[int]:
    """The set with one layer replaced by another."""
    return layers - {out} | {into}
