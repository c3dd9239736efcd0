"""Greedy search: the layer that helps most beside those chosen, again and again, by true losses.

Its order is nested: the set of every count contains the set of every smaller one. Static rankings
lose to it because they do not know what the chosen layers already do (Distill-then-Replace, arXiv
2601.11667). See `converter.calibration.search.changes` for how few layers are measured again at
each step.
"""

from __future__ import annotations

from dataclasses import dataclass

from converter.calibration.search.changes import Change, best_first, overtaking, worth_measuring
from converter.calibration.search.oracle import Losses, measure


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

    No gain at all is no reason to stop: layers that help only together show none one by one. Among
    equals the lowest layer is added.

    Args:
        losses: the oracle.
        total: layers of the model.
        upto: how many layers are added by measuring; the rest follow by what is known then.
    """
    chosen: list[int] = []
    measured: list[int] = []
    path = [frozenset[int]()]
    changes: dict[int, Change] = {}
    for step in range(upto):
        trials = list(range(total)) if step == 0 else worth_measuring(changes)
        measured.append(0)
        while trials:
            base, *after = measure(losses, [path[-1], *(path[-1] | {layer} for layer in trials)])
            for layer, one in zip(trials, after, strict=True):
                changes[layer] = Change(one.loss - base.loss, step)
            measured[-1] += len(trials)
            trials = overtaking(changes, step)
        best = best_first(changes)[0]
        del changes[best]
        chosen.append(best)
        path.append(path[-1] | {best})
    rest = best_first(changes) if upto else range(total)
    # All but the start of a search without steps have been measured already.
    found = tuple(one.loss for one in measure(losses, path))
    unknown = (None,) * (total - upto)
    return GreedyOrder((*chosen, *rest), (*found, *unknown), tuple(measured))
