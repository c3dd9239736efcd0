"""Evolution: random swaps of a good set, thinned out on ever more examples.

After EvoPress (arXiv 2410.14649), which searches how strongly to compress each layer: a generation
is the parent and its mutations, mutations switch levels so that the budget holds, and selection is
by stages, many offspring on few examples and few on all. Here a level switch gives one layer full
attention and takes it from another.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from converter.calibration.search.oracle import (
    Candidate,
    Losses,
    PartialLosses,
    by_loss,
    check_one_size,
    measure,
)

# Of the offspring and of the examples, what a stage keeps and what the stage before it looks at.
_THIN = 4
# Draws for one offspring before giving up on finding a set that has not been measured.
_DRAWS = 20


@dataclass(frozen=True)
class Evolution:
    """What an evolution found.

    Attributes:
        best: the best set and its loss on all examples.
        trace: the best set before the first generation and after each one.
    """

    best: Candidate
    trace: tuple[Candidate, ...]


def evolve(
    losses: PartialLosses,
    starts: Sequence[frozenset[int]],
    total: int,
    *,
    examples: int,
    generations: int,
    offspring: int = 32,
    seed: int = 0,
) -> Evolution:
    """Search from the best of the given sets; the number of layers stays.

    A set replaces the parent only when its loss on all examples is lower, so the trace never
    rises. It ends early when no set is drawn that has not been measured on all examples.

    Args:
        losses: the oracle, by number of examples.
        starts: sets of equal size, at least one.
        total: layers of the model.
        examples: how many there are.
        generations: the most that are bred.
        offspring: sets drawn in each.
        seed: of the mutations.

    Raises:
        ValueError: there are no starts, or they differ in size.
    """
    check_one_size(starts)
    rng = random.Random(seed)  # noqa: S311 (reproducible on purpose)

    on_all = _over(losses, examples)
    beginning = measure(on_all, starts)
    finished = {one.layers for one in beginning}
    trace = [by_loss(beginning)[0]]
    for _ in range(generations):
        parent = trace[-1]
        drawn = _offspring(parent.layers, total, offspring, finished, rng)
        if not drawn:
            break
        finalists = measure(on_all, _thinned(losses, drawn, examples))
        finished.update(one.layers for one in finalists)
        best = by_loss(finalists)[0]
        trace.append(best if best.loss < parent.loss else parent)
    return Evolution(trace[-1], tuple(trace))


def _thinned(
    losses: PartialLosses, sets: Sequence[frozenset[int]], examples: int
) -> list[frozenset[int]]:
    """The sets worth measuring on all examples: a sixteenth of them, by two stages on fewer."""
    remaining = list(sets)
    for part in (_THIN**2, _THIN):
        measured = measure(_over(losses, -(-examples // part)), remaining)
        keep = -(-len(remaining) // _THIN)
        remaining = [one.layers for one in by_loss(measured)[:keep]]
    return remaining


def _over(losses: PartialLosses, examples: int) -> Losses:
    """The oracle over the first so many examples."""
    return lambda sets: losses(sets, examples)


def _offspring(
    parent: frozenset[int],
    total: int,
    count: int,
    finished: set[frozenset[int]],
    rng: random.Random,
) -> list[frozenset[int]]:
    """Different mutations of a set, none of them measured on all examples before."""
    drawn: dict[frozenset[int], None] = {}
    for _ in range(_DRAWS * count):
        mutation = _mutated(parent, total, rng)
        if mutation not in finished:
            drawn[mutation] = None
        if len(drawn) == count:
            break
    return list(drawn)


def _mutated(parent: frozenset[int], total: int, rng: random.Random) -> frozenset[int]:
    """Swap one layer in half of the cases, two in a quarter, and so on."""
    inside = sorted(parent)
    outside = [layer for layer in range(total) if layer not in parent]
    switches, most = 1, min(len(inside), len(outside))
    while switches < most and rng.random() < 0.5:
        switches += 1
    switches = min(switches, most)
    return parent - set(rng.sample(inside, switches)) | set(rng.sample(outside, switches))
