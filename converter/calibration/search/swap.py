"""Swap refinement: exchange a layer inside a set for one outside, while that lowers the loss.

Single switches foretell swaps: if layers acted on their own, taking one out and another in would
change the loss by the sum of both changes. So all single switches are measured, and only the swaps
that they make look best are tried truly.
"""

from __future__ import annotations

from dataclasses import dataclass

from converter.calibration.search.oracle import Candidate, Losses, by_loss, measure, swapped


@dataclass(frozen=True)
class Swap:
    """One layer replaced by another.

    Attributes:
        out, into: the layer that slides from now on, and the one that has full attention.
        predicted: the loss foretold from single switches, in nats per answer token.
        loss: the true one.
    """

    out: int
    into: int
    predicted: float
    loss: float


@dataclass(frozen=True)
class Refinement:
    """A set after swaps.

    Attributes:
        start, best: the set before and after.
        swaps: those made, in order.
        settled: whether the search ended because no swap tried was better, and not by its limit.
    """

    start: Candidate
    best: Candidate
    swaps: tuple[Swap, ...]
    settled: bool


def refine(
    losses: Losses, layers: frozenset[int], total: int, *, tries: int = 8, rounds: int = 16
) -> Refinement:
    """Swap layers of a set while the loss falls; the number of layers stays.

    Args:
        losses: the oracle.
        layers: the set to start from.
        total: layers of the model.
        tries: how many swaps are measured in a round.
        rounds: the most swaps that are made.
    """
    # One call for the set and for what the first round asks.
    start = best = measure(losses, [layers, *_switched(layers, total).values()])[0]
    swaps: list[Swap] = []
    for _ in range(rounds):
        swap = _best_swap(losses, best, total, tries)
        if swap is None or swap.loss >= best.loss:
            return Refinement(start, best, tuple(swaps), settled=True)
        swaps.append(swap)
        best = Candidate(swapped(best.layers, swap.out, swap.into), swap.loss)
    return Refinement(start, best, tuple(swaps), settled=False)


def _best_swap(losses: Losses, now: Candidate, total: int, tries: int) -> Swap | None:
    """The truly best of the swaps that single switches make look best; None if there are none."""
    switches = _switched(now.layers, total)
    after = {one.layers: one.loss for one in measure(losses, switches.values())}
    change = {layer: after[layers] - now.loss for layer, layers in switches.items()}
    predicted = {
        swapped(now.layers, out, into): (now.loss + (change[out] + change[into]), out, into)
        for out in change.keys() & now.layers
        for into in change.keys() - now.layers
    }
    promising = sorted(predicted, key=lambda layers: predicted[layers])[:tries]
    if not promising:
        return None
    best = by_loss(measure(losses, promising))[0]
    foretold, out, into = predicted[best.layers]
    return Swap(out, into, foretold, best.loss)


def _switched(layers: frozenset[int], total: int) -> dict[int, frozenset[int]]:
    """The set with each layer switched; nothing where no swap is possible."""
    if len(layers) in (0, total):
        return {}
    return {layer: layers ^ {layer} for layer in range(total)}
