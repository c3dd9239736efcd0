"""Searches: sets of layers that keep full attention, by their true losses.

Static rankings lose to them because they do not know what the chosen layers already do
(Distill-then-Replace, arXiv 2601.11667). The algorithms know an oracle of losses and no model, are
deterministic, and among equally good layers or sets the lower layer index wins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import isnan
from typing import TYPE_CHECKING

from converter.calibration.scores import means, rank
from converter.calibration.selectors.base import Choice, Selector
from converter.calibration.selectors.baselines import periodic_layers, periodic_offsets
from converter.calibration.selectors.one_layer import NLL_RESTORE
from converter.calibration.selectors.ranking import example_scores
from converter.inference.positions import TokenSpans, layer_forwards
from converter.model.mask import Mask
from converter.plan.units import Units

if TYPE_CHECKING:
    from converter.calibration.evaluator import PlanEvaluator

# The mean answer loss of each set of full-attention layers, in nats per token; lower is better. It
# is exact and always the same for a set. Who gives it remembers it, so that asking again is free;
# asking for many sets in one call is much cheaper than for one after another.
Losses = Callable[[Sequence[frozenset[int]]], Sequence[float]]


@dataclass(frozen=True)
class MeasuredSet:
    """A set of full-attention layers and its loss, in nats per answer token."""

    layers: frozenset[int]
    loss: float


def measure(losses: Losses, sets: Iterable[frozenset[int]]) -> list[MeasuredSet]:
    """The losses of sets, asked for in one call, each set once; in the order of the sets.

    Raises:
        ValueError: a loss is not a number, or there are not as many as sets.
    """
    asked = list(dict.fromkeys(sets))
    if not asked:
        return []
    measured = [MeasuredSet(s, float(x)) for s, x in zip(asked, losses(asked), strict=True)]
    for one in measured:
        if isnan(one.loss):
            raise ValueError(f"the loss of {sorted(one.layers)} is not a number")
    return measured


def by_loss(measured: Iterable[MeasuredSet]) -> list[MeasuredSet]:
    """Ascending by loss; of equal ones, the set whose sorted layers come first goes first."""
    return sorted(measured, key=lambda one: (one.loss, sorted(one.layers)))


# Which layers greedy search measures again after a step. Minoux (1978) and CELF (Leskovec et al.,
# 2007) keep old gains in a queue and measure only its head again, which gives the same answer when
# the function is submodular: an old gain is then an upper bound. The loss of a network is not:
# layers that only help together gain from each other's presence, and an old gain knows nothing of
# it. So besides the head of the queue a margin is always measured again: the best quarter, and the
# quarter that has waited longest, so that no layer is forgotten for more than about three steps.
#
# On 60 synthetic losses of 36 layers (questions of one to three lookups, each lookup shared by one
# to five layers), 9 layers chosen: the bare queue measured 66 sets where measuring everything takes
# 288, and ended 0.51 nats higher; the best quarter alone 112 and 0.26; both quarters 170 and 0.06.
_PARTS = 4
_LEAST = 4


@dataclass(frozen=True)
class Change:
    """What adding a layer did when it was last measured.

    Attributes:
        difference: loss with the layer less the loss without, in nats per answer token.
        step: the step it was measured at.
    """

    difference: float
    step: int


def _best_first(changes: Mapping[int, Change]) -> list[int]:
    """Layers by ascending difference; equal ones keep the order of the mapping."""
    return sorted(changes, key=lambda layer: changes[layer].difference)


def worth_measuring(changes: Mapping[int, Change]) -> list[int]:
    """The layers to measure again before a step: the best, and of the others the longest waiting.

    A quarter of the layers each, and at least four.
    """
    margin = max(_LEAST, -(-len(changes) // _PARTS))
    order = _best_first(changes)
    waiting = sorted(order[margin:], key=lambda layer: changes[layer].step)
    return order[:margin] + waiting[:margin]


def greedy_order(losses: Losses, total: int, upto: int) -> tuple[int, ...]:
    """Every layer: first those that lower the loss most beside the ones before them, one by one.

    No gain at all is no reason to stop: layers that help only together show none one by one. Among
    equals the lowest layer is added.

    As many as `upto` are added by measuring; the rest are ordered by the change they were last seen
    to make, and by their index where they were never measured.
    """
    chosen: list[int] = []
    changes: dict[int, Change] = {}
    for step in range(upto):
        now = frozenset(chosen)
        trials = list(range(total)) if step == 0 else worth_measuring(changes)
        while trials:
            base, *after = measure(losses, [now, *(now | {layer} for layer in trials)])
            for layer, one in zip(trials, after, strict=True):
                changes[layer] = Change(one.loss - base.loss, step)
            # The first few whose old changes are better than any measured at this step.
            old = {layer for layer, change in changes.items() if change.step < step}
            trials = list(takewhile(old.__contains__, _best_first(changes)))[:_LEAST]
        best = _best_first(changes)[0]
        del changes[best]
        chosen.append(best)
    return (*chosen, *(_best_first(changes) if upto else range(total)))


def refine(
    losses: Losses, layers: frozenset[int], total: int, *, tries: int = 8, rounds: int = 16
) -> MeasuredSet:
    """Swap layers of a set for others while the loss falls; the number of layers stays.

    Single switches foretell swaps: if layers acted on their own, taking one out and another in
    would change the loss by the sum of both changes. So all single switches are measured, and only
    the swaps that they make look best are tried truly: in each of at most so many rounds a few.
    """
    # One call for the set and for what the first round asks.
    best = measure(losses, [layers, *_switched(layers, total).values()])[0]
    for _ in range(rounds):
        swapped = _best_swap(losses, best, total, tries)
        if swapped is None or swapped.loss >= best.loss:
            break
        best = swapped
    return best


def _best_swap(losses: Losses, now: MeasuredSet, total: int, tries: int) -> MeasuredSet | None:
    """The truly best of the swaps that single switches make look best; None if there are none."""
    switches = _switched(now.layers, total)
    after = measure(losses, switches.values())
    slopes = [
        (one.loss - now.loss) * (-1 if layer in now.layers else 1)
        for layer, one in zip(switches, after, strict=True)
    ]
    promising = promising_swaps(now.layers, slopes, frozenset(switches))[:tries]
    return by_loss(measure(losses, promising))[0] if promising else None


def promising_swaps(
    layers: frozenset[int], slopes: Sequence[float], free: frozenset[int]
) -> list[frozenset[int]]:
    """The swaps of one layer for another, first those that foretell the lowest loss.

    Equally promising ones come in the order of the layer that goes, then of the one that comes.

    Args:
        layers: the set to begin with.
        slopes: what each layer's full attention adds to the loss, the others as they are.
        free: layers that may go or come.
    """
    foretold = {
        (slopes[into] - slopes[out], out, into): layers - {out} | {into}
        for out in layers & free
        for into in free - layers
    }
    return [foretold[swap] for swap in sorted(foretold)]


def _switched(layers: frozenset[int], total: int) -> dict[int, frozenset[int]]:
    """The set with each layer switched; nothing where no swap is possible."""
    if len(layers) in (0, total):
        return {}
    return {layer: layers ^ {layer} for layer in range(total)}


@dataclass(frozen=True)
class Smallest:
    """The smallest prefix found of an order of layers whose loss is within the bound.

    Attributes:
        full: all layers, which the bound is counted from.
        measured: everything measured on the way, by count.
    """

    found: MeasuredSet
    full: MeasuredSet
    measured: tuple[MeasuredSet, ...]


def smallest_within(losses: Losses, order: Sequence[int], bound: float) -> Smallest:
    """The smallest prefix of an order whose loss is at most `bound` nats above that of all layers.

    By bisection, which assumes that losses fall along the order. Whether they do or not, the prefix
    returned has been measured and is within the bound, and the prefix one layer shorter, if there
    is one, has been measured and is not. Where losses do not fall, a shorter one may be as well.

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
        few, enough = (few, middle) if within(middle) else (middle, enough)
    return Smallest(known[enough], full, tuple(known[count] for count in sorted(known)))


def choice_around(
    evaluator: PlanEvaluator, found: frozenset[int], order: Sequence[int] | None = None
) -> Choice:
    """The found layers first, then the others, each in an order of all layers.

    By default that is the order of what each is worth where the others are as found.
    """
    switched = [found ^ {layer} for layer in range(evaluator.total)]
    by_set = evaluator.answers([found, *switched])
    examples = []
    for example, (itself, *others) in zip(
        evaluator.examples, zip(*by_set, strict=True), strict=True
    ):
        # What each layer's full attention takes off the loss, the other layers as found.
        scores = [
            (answer.nll - itself.nll) * (1 if layer in found else -1)
            for layer, answer in enumerate(others)
        ]
        examples.append(example_scores(example, None, None, scores))
    ranked = rank(means(examples)) if order is None else order
    # A stable sort: those that were found come first.
    return Choice(tuple(sorted(ranked, key=lambda i: i not in found)), tuple(examples))


def typical_cost(spans: TokenSpans, mask: Mask, sets: float, units: Units, keep: int) -> float:
    """What measuring so many sets comes to, in layer-forwards.

    They are taken to be a unit apart from the same evenly spaced set of `keep`. The fuller sets
    are, the more they cost: below the highest full layer every row is needed.
    """
    spaced = frozenset(i * units.total // keep for i in range(keep))
    plans = [units.types(spaced), *(units.types(spaced ^ {unit}) for unit in range(units.total))]
    return layer_forwards(plans, spans, mask) * sets / len(plans)


def greedy_cost(spans: TokenSpans, mask: Mask, units: Units, keep: int) -> float:
    """A guess: every unit once, then half of them at each step, while the set grows to `keep`."""
    later = max(0, keep - 1) * max(_LEAST, units.total // 2)
    first = typical_cost(spans, mask, units.total + 1 + later / 2, units, 0)
    return first + typical_cost(spans, mask, later / 2, units, keep)


class Search(Selector):
    """Swaps, from the best of the starts that are cheap to have.

    The starts are the greedy set, the best layers by restore-one (greedy's first step has measured
    them) and the periodic plans. So on the examples searched on, the result is never worse than any
    of them.
    """

    def choose(self, evaluator: PlanEvaluator, keep: int) -> Choice:
        """The refined set, its layers in the greedy order."""
        total = evaluator.total
        restored = rank(means(NLL_RESTORE.scores(evaluator, range(total))))
        order = greedy_order(evaluator.losses, total, keep)
        units = evaluator.units
        layers = keep // units.per_layer
        offsets = range(periodic_offsets(units.layers, layers))
        periodic = [
            units.of_layers(periodic_layers(units.layers, layers, offset)) for offset in offsets
        ]
        starts = map(frozenset, [order[:keep], restored[:keep], *periodic])
        best = by_loss(measure(evaluator.losses, starts))[0]
        return choice_around(evaluator, refine(evaluator.losses, best.layers, total).layers, order)

    def cost(self, spans: TokenSpans, mask: Mask, units: Units, keep: int) -> float:
        """A guess: greedy, the other starts, and two rounds of swaps."""
        periodic = periodic_offsets(units.layers, keep // units.per_layer)
        sets = 2 * (units.total + 8) + periodic
        swaps = typical_cost(spans, mask, sets, units, keep)
        return greedy_cost(spans, mask, units, keep) + swaps


SEARCH = Search(
    "search", "greedy, restore-one or periodic, whichever is best, then swaps while they help"
)
