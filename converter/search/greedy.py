"""Greedy search: the best single switch, again and again, by true losses.

Its order is nested: the set of every count contains the set of every smaller one. Static rankings
lose to it because they do not know what the chosen layers already do (Distill-then-Replace, arXiv
2601.11667). Adding from the empty set suits small budgets and removing from all layers suits large
ones. See `converter.search.changes` for how few layers are measured again at each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from converter.search.changes import Change, best_first, overtaking, worth_measuring
from converter.search.oracle import Losses, measure


@dataclass(frozen=True)
class GreedyOrder:
    """Nested sets, one for every count of layers.

    Attributes:
        order: every layer, the one to have full attention first at the front.
        losses: of the first 0, 1, ... layers of the order, in nats per answer token. None past the
            last step that was measured: from there on layers are ordered by the change they were
            last seen to make, and by their index where they were never measured.
        measured: how many layers were switched on trial at each measured step, in the order of
            the steps.
    """

    order: tuple[int, ...]
    losses: tuple[float | None, ...]
    measured: tuple[int, ...]

    def first(self, count: int) -> frozenset[int]:
        """The set of `count` layers."""
        return frozenset(self.order[:count])


def greedy_add(losses: Losses, total: int, upto: int) -> GreedyOrder:
    """Add the layer that lowers the loss most, from no layers on.

    No gain at all is no reason to stop: layers that help only together show none one by one.

    Args:
        losses: the oracle.
        total: layers of the model.
        upto: how many layers are added by measuring; the rest follow by what is known then.
    """
    switches, found, measured = _switch(losses, frozenset(), range(total), upto)
    unknown = (None,) * (total - upto)
    return GreedyOrder(order=switches, losses=(*found, *unknown), measured=measured)


def greedy_remove(losses: Losses, total: int, downto: int) -> GreedyOrder:
    """Remove the layer whose loss is least, from all layers on.

    Args:
        losses: the oracle.
        total: layers of the model.
        downto: how many layers are left when measuring ends; those before them in the order are
            sorted by what is known then.
    """
    # The last layer goes first among equals, so that the lower ones keep full attention.
    highest_first = range(total - 1, -1, -1)
    switches, found, measured = _switch(
        losses, frozenset(range(total)), highest_first, total - downto
    )
    unknown = (None,) * downto
    return GreedyOrder(order=switches[::-1], losses=(*unknown, *found[::-1]), measured=measured)


def _switch(
    losses: Losses, start: frozenset[int], layers: Sequence[int], steps: int
) -> tuple[tuple[int, ...], tuple[float, ...], tuple[int, ...]]:
    """Switch layers one by one, the best first; among equals, the first of `layers`.

    Returns the order of the switches, the loss before the first and after each measured one, and
    how many layers each measured one was chosen from.
    """
    chosen: list[int] = []
    measured: list[int] = []
    path = [start]
    changes: dict[int, Change] = {}
    for step in range(steps):
        trials = list(layers) if step == 0 else worth_measuring(changes)
        measured.append(0)
        while trials:
            base, *after = measure(losses, [path[-1], *(path[-1] ^ {layer} for layer in trials)])
            for layer, one in zip(trials, after, strict=True):
                changes[layer] = Change(one.loss - base.loss, step)
            measured[-1] += len(trials)
            trials = overtaking(changes, step)
        best = best_first(changes)[0]
        del changes[best]
        chosen.append(best)
        path.append(path[-1] ^ {best})
    rest = best_first(changes) if changes else [x for x in layers if x not in chosen]
    # All but the start of a search without steps have been measured already.
    found = tuple(one.loss for one in measure(losses, path))
    return (*chosen, *rest), found, tuple(measured)
