"""Made-up losses of sets of layers, and the slow searches that the quick ones are held against.

Nothing of `converter` is used here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from itertools import combinations
from math import log

Loss = Callable[[frozenset[int]], float]


class Oracle:
    """Tells losses, remembers them as the real one does, and counts what it was asked."""

    def __init__(self, loss: Loss) -> None:
        self._loss = loss
        self.known: dict[frozenset[int], float] = {}
        self.calls: list[list[frozenset[int]]] = []

    def __call__(self, sets: Sequence[frozenset[int]]) -> list[float]:
        """The losses; a search that repeats itself within a call wastes work."""
        assert len(set(sets)) == len(sets)
        self.calls.append([layers for layers in sets if layers not in self.known])
        self.known.update({layers: self._loss(layers) for layers in self.calls[-1]})
        return [self.known[layers] for layers in sets]


def additive(gains: Sequence[float]) -> Loss:
    """Layers that act on their own; exact where gains are whole numbers."""
    return lambda layers: float(sum(gains) - sum(gains[layer] for layer in layers))


def covering(total: int, seed: int) -> Loss:
    """Facts that any of a few layers can find: substitutes, hence submodular; whole numbers."""
    rng = random.Random(seed)  # noqa: S311 - reproducible
    finders = [frozenset(rng.sample(range(total), rng.randint(1, 4))) for _ in range(2 * total)]
    worth = [rng.randint(1, 5) for _ in finders]
    return lambda layers: float(
        sum(w for w, finder in zip(worth, finders, strict=True) if not finder & layers)
    )


def lookups(total: int, seed: int, questions: int = 8) -> Loss:
    """Questions of one to three lookups, each shared by one to five layers, all of them needed."""
    gated = gated_lookups(total, seed, questions)
    return lambda layers: gated([layer in layers for layer in range(total)])


def gated_lookups(total: int, seed: int, questions: int = 8) -> Callable[[Sequence[float]], float]:
    """The same by a gate for each layer, which a layer's help is multiplied with."""
    rng = random.Random(seed)  # noqa: S311 - reproducible
    chains = [
        [
            {layer: rng.betavariate(0.6, 0.6) for layer in rng.sample(range(total), count)}
            for count in rng.choices(range(1, min(5, total) + 1), k=rng.choice((1, 1, 2, 2, 3)))
        ]
        for _ in range(questions)
    ]

    def loss(gates: Sequence[float]) -> float:
        nats = 0.0
        for chain in chains:
            right = 1.0
            for helpers in chain:
                missed = 1.0
                for layer, strength in helpers.items():
                    missed *= 1 - strength * gates[layer]
                right *= 1 - missed
            nats -= log(0.02 + 0.98 * right)
        return nats / questions

    return loss


def slopes(loss: Callable[[Sequence[float]], float], gates: Sequence[float]) -> list[float]:
    """The derivative by every gate, from differences."""
    step = 1e-5

    def at(layer: int, change: float) -> float:
        return loss([gate + change * (i == layer) for i, gate in enumerate(gates)])

    return [(at(layer, step) - at(layer, -step)) / (2 * step) for layer in range(len(gates))]


def arbitrary(seed: int, values: int = 1_000_000) -> Loss:
    """Any number for any set; ties where there are few values."""

    @cache
    def loss(layers: frozenset[int]) -> float:
        return float(random.Random(f"{seed} {sorted(layers)}").randrange(values))  # noqa: S311

    return loss


def subsets(total: int, count: int) -> list[frozenset[int]]:
    """All sets of so many layers, those with lower indices first."""
    return [frozenset(layers) for layers in combinations(range(total), count)]


def optimum(loss: Loss, total: int, count: int) -> frozenset[int]:
    """The best set of so many layers, the one with lower indices among equals."""
    return min(subsets(total, count), key=loss)


def patient_greedy(loss: Loss, total: int) -> tuple[int, ...]:
    """Greedy addition that measures every layer at every step."""
    order: list[int] = []
    for _ in range(total):
        left = [layer for layer in range(total) if layer not in order]
        order.append(min(left, key=lambda layer: loss(frozenset([*order, layer]))))
    return tuple(order)
