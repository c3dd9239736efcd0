"""What adding one layer does to the loss, remembered while the set around it grows.

Measuring every layer again after every step is what makes greedy search dear. Minoux (1978) and
CELF (Leskovec et al., 2007) keep old gains in a queue and measure only its head again, which gives
the same answer when the function is submodular: an old gain is then an upper bound. The loss of a
network is not: layers that only help together gain from each other's presence, and an old gain
knows nothing of it. So besides the head of the queue a margin is always measured again: the best
quarter, and the quarter that has waited longest, so that no layer is forgotten for more than about
three steps.

On 60 synthetic losses of 36 layers (questions of one to three lookups, each lookup shared by one to
five layers), 9 layers chosen: the bare queue measured 66 sets where measuring everything takes 288,
and ended 0.51 nats higher; the best quarter alone 112 and 0.26; both quarters 170 and 0.06.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_PARTS = 4
_LEAST = 4


@dataclass(frozen=True)
class Change:
    """What switching a layer did when it was last measured.

    Attributes:
        difference: loss with the layer switched less the loss without, in nats per answer token.
        step: the step it was measured at.
    """

    difference: float
    step: int


def best_first(changes: Mapping[int, Change]) -> list[int]:
    """Layers by ascending difference; equal ones keep the order of the mapping."""
    return sorted(changes, key=lambda layer: changes[layer].difference)


def worth_measuring(changes: Mapping[int, Change]) -> list[int]:
    """The layers to measure again before a step: the best, and of the others the longest waiting.

    A quarter of the layers each, and at least four.
    """
    margin = max(_LEAST, -(-len(changes) // _PARTS))
    order = best_first(changes)
    waiting = sorted(order[margin:], key=lambda layer: changes[layer].step)
    return order[:margin] + waiting[:margin]


def overtaking(changes: Mapping[int, Change], step: int) -> list[int]:
    """The first few layers whose old changes are better than any measured at this step."""
    old = []
    for layer in best_first(changes):
        if changes[layer].step == step:
            break
        old.append(layer)
    return old[:_LEAST]
