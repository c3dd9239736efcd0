"""Guided search: gate gradients propose sets of layers, true losses decide between them.

A gradient costs about three passes whatever the depth, and says of every layer what its full
attention is worth beside the others; a search that measures every layer for itself pays for each.
At a set itself gates are 0 and 1, where the response to them is flat, so gradients are taken with
the gates pulled back towards each other. Of few layers measuring each costs less than gradients do,
and then `SEARCH` does that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from math import fsum, inf
from statistics import fmean
from typing import TYPE_CHECKING

from converter.calibration.scores import means, rank
from converter.calibration.selectors.base import Choice, Selector
from converter.calibration.selectors.gates import gradient_record, recorded_gradients
from converter.calibration.selectors.racing import round_ends
from converter.calibration.selectors.ranking import example_scores
from converter.calibration.selectors.search import (
    SEARCH,
    by_loss,
    measure,
    promising_swaps,
    typical_cost,
)
from converter.inference.positions import TokenSpans
from converter.model.mask import Mask
from converter.plan.units import Units

if TYPE_CHECKING:
    from converter.calibration.evaluator import PlanEvaluator
    from converter.calibration.run import Find
    from converter.inference.example import Example
    from converter.inference.gate_gradients import GateGradients, Gates
    from converter.inference.runner import Advance, ModelRunner

# How many passes of the model over each example guided search may take. On synthetic losses of 36
# layers (as `lookups` of the tests, with 64 noisy examples) 10, 14 and 40 passes ended 0.19, 0.10
# and 0.02 nats above the search that measures every layer, which takes 70 to 170.
EFFORTS = {"low": 10, "normal": 14, "high": 40}
NORMAL = "normal"
# What a gradient takes, about; and at most, about, the swaps tried at a time.
GRADIENT_PASSES = 3.0
# Swaps tried at a time, and in how many of them one unit may have part: a gradient may be wrong
# about it. (Where one layer answers everything, its slope is flat, and it seems to be worth least.)
TRIES = 8
_TRIES_OF_ONE = TRIES // 2
# Gauss-Legendre nodes on the way from all sliding to all full: two are exact for a cubic. What is
# found on so many examples is a start as good as what is found on more.
_NODES = (0.5 - 3**-0.5 / 2, 0.5 + 3**-0.5 / 2)
_EXAMPLES_TO_START = 32
# Gates of sliding and of full layers where a set's gradient is taken: first far from the set, then
# close to it, where what layers do together shows. On 50 synthetic losses of 36 and 64 layers (as
# `lookups` of the tests) the second pair took the loss above the search's from 0.07 to 0.02 nats.
_PULLED_BACK = ((0.25, 0.75), (0.05, 0.95))
# Where one order has to serve every number of layers, sets of these shares of all layers are found
# in turn, the second within the first and the third around it.
_ANCHORS = (1 / 4, 1 / 8, 1 / 2)


@dataclass(frozen=True)
class Oracle:
    """What guided search asks.

    Attributes:
        slopes_at: what every unit's full attention adds to the loss at some gates, in nats per
            answer token; below 0 where it helps.
        losses: mean losses of sets on the first so many examples.
        examples: how many there are.
        may_go_on: whether a step of about so many passes over each example may be taken.
        passes_to_try: what trying swaps once may take.
    """

    slopes_at: Callable[[Gates], Sequence[float]]
    losses: Callable[[Sequence[frozenset[int]], int], Sequence[float]]
    examples: int
    may_go_on: Callable[[float], bool]
    passes_to_try: float = GRADIENT_PASSES


def guided_set(
    oracle: Oracle, start: frozenset[int], free: frozenset[int], units: Units
) -> tuple[frozenset[int], Gates]:
    """The set that no swap foretold by its own gradient makes better, and that gradient's gates.

    A gradient serves until the swaps that it foretells no longer help; a unit that was swapped
    stays for so long. Sets that were tried are not tried again. When no gradient is left to take,
    every unit is tried once: the last one may be wrong about layers that do the same.

    Args:
        start: the set to begin with.
        free: units that may be swapped.
    """
    now, level, tried = start, 0, {start}
    gates = gates_around(start, units, 0)
    while level < len(_PULLED_BACK) and oracle.may_go_on(GRADIENT_PASSES):
        gates = gates_around(now, units, level)
        slopes, movable, level = oracle.slopes_at(gates), free, level + 1
        doubted: set[int] = set()
        while oracle.may_go_on(oracle.passes_to_try):
            swaps = [
                *(joint_swaps(now, slopes, movable) if units.of_heads else ()),
                *promising_swaps(now, slopes, movable),
            ]
            new = [one for one in dict.fromkeys(swaps) if one not in tried]
            swaps = mixed(now, [one for one in new if not one ^ now <= doubted])
            tried.update(swaps)
            better = _best_swap(oracle, now, swaps)
            if better is not None:
                level, movable, now = 0, movable - (better ^ now), better
            elif not swaps or level < len(_PULLED_BACK):
                break
            else:
                doubted.update(*(one ^ now for one in swaps))
    return now, gates


def mixed(now: frozenset[int], swaps: Sequence[frozenset[int]]) -> list[frozenset[int]]:
    """The first few swaps that do not all stand on what was foretold of one unit."""
    parts: Counter[int] = Counter()
    chosen, others = [], []
    for swap in swaps:
        units = swap ^ now
        if max(parts[unit] for unit in units) < _TRIES_OF_ONE:
            parts.update(units)
            chosen.append(swap)
        else:
            others.append(swap)
    return [*chosen, *others][:TRIES]


def _best_swap(
    oracle: Oracle, now: frozenset[int], swaps: Sequence[frozenset[int]]
) -> frozenset[int] | None:
    """The best of some sets, if it is better than what there is.

    All are measured on few examples, and the better half of what is left on ever more of them.
    """
    left = list(swaps)
    for end in round_ends(oracle.examples):
        before, *after = measure(partial(_on_first, oracle, end), [now, *left])
        better = [one for one in by_loss(after) if end < oracle.examples or one.loss < before.loss]
        left = [one.layers for one in better[: -(-len(left) // 2)]]
    return left[0] if left else None


def _on_first(oracle: Oracle, end: int, sets: Sequence[frozenset[int]]) -> Sequence[float]:
    return oracle.losses(sets, end)


def joint_swaps(
    now: frozenset[int], slopes: Sequence[float], free: frozenset[int]
) -> list[frozenset[int]]:
    """Several swaps at once: 2, 4, 8, ... of the pairs that foretell the lowest loss, most first.

    Where KV heads are swapped there are many of them and each matters little.
    """
    pairs = zip(
        sorted(now & free, key=lambda unit: (-slopes[unit], unit)),
        sorted(free - now, key=lambda unit: (slopes[unit], unit)),
        strict=False,
    )
    helping = [(out, into) for out, into in pairs if slopes[into] < slopes[out]]
    sizes = (2**power for power in range(len(helping).bit_length() - 1, 0, -1))
    return [now ^ frozenset(chain(*helping[:size])) for size in sizes]


def gates_around(full: frozenset[int], units: Units, level: int) -> Gates:
    """A gate for each unit, pulled back from where it is closed or open."""
    return units.rows([_PULLED_BACK[level][unit in full] for unit in range(units.total)])


def path_order(slopes_at: Callable[[Gates], Sequence[float]], units: Units) -> tuple[int, ...]:
    """The units by a short path integral from all sliding to all full."""
    slopes = [slopes_at(units.rows([node] * units.total)) for node in _NODES]
    return rank([-fmean(of_unit) for of_unit in zip(*slopes, strict=True)])


def nested_order(
    oracle: Oracle, parts: Sequence[Callable[[float], bool]], path: Sequence[int], units: Units
) -> tuple[tuple[int, ...], Gates]:
    """One order of the units whose front serves for any number of them, and its gradient's gates.

    Args:
        oracle: what may be asked.
        parts: for each anchor, whether a step of so many passes may be taken to it.
        path: the units in the order to start from.
    """
    total, everything = len(path), frozenset(path)

    def found(
        number: int, count: int, order: Sequence[int], inner: frozenset[int], outer: frozenset[int]
    ) -> tuple[frozenset[int], tuple[int, ...], Gates]:
        """A set around `inner` and within `outer`, and all units by what they are worth there."""
        new = [unit for unit in order if unit in outer - inner]
        start = inner | frozenset(new[: max(0, count - len(inner))])
        asked = replace(oracle, may_go_on=parts[number])
        full, gates = guided_set(asked, start, outer - inner, units)
        return full, rank([-slope for slope in oracle.slopes_at(gates)]), gates

    quarter, eighth, half = (max(1, round(total * share)) for share in _ANCHORS)
    first, around, gates = found(0, quarter, path, frozenset(), everything)
    few, within, _ = found(1, eighth, around, frozenset(), first)
    many, beyond, _ = found(2, half, around, first, everything)
    sections = ((within, few), (within, first), (around, many), (beyond, everything))
    order = dict.fromkeys(unit for ranked, some in sections for unit in ranked if unit in some)
    return tuple(order), gates


@dataclass(frozen=True)
class Guided(Selector):
    """Swaps that gradients propose, from the best units by a short path integral.

    Attributes:
        passes: of the whole model over each example, at most about so many.
    """

    passes: int = EFFORTS[NORMAL]

    def choose(self, evaluator: PlanEvaluator, keep: int) -> Choice:
        """The set found, and then the others, each in the order of the last gradient.

        Where all units are kept, one order is found that serves any number of them.
        """
        units, examples = evaluator.units, len(evaluator.examples)
        one_pass = evaluator.shape.layers * examples
        limit = float(self.passes * one_pass)
        spans, mask = list(map(evaluator.spans, evaluator.examples)), evaluator.mask
        if fsum(_cost_of_search(each, mask, units, keep) for each in spans) <= limit:
            return SEARCH.choose(evaluator, keep)
        tries = fsum(typical_cost(each, mask, TRIES, units, keep) for each in spans) / one_pass

        def gradients(gates: Gates, some: int) -> list[GateGradients]:
            return recorded_gradients(evaluator, "answer", gates, _find_at(gates), range(some))

        def slopes_at(gates: Gates, some: int = examples) -> list[float]:
            by_example = [found.slopes for found in gradients(gates, some)]
            return [fmean(of_unit) for of_unit in zip(*by_example, strict=True)]

        def losses(sets: Sequence[frozenset[int]], end: int) -> list[float]:
            answers = evaluator.answers(sets, end=end)
            return [fmean(answer.nll for answer in of_set) for of_set in answers]

        path = path_order(partial(slopes_at, some=min(_EXAMPLES_TO_START, examples)), units)
        begun = evaluator.layer_forwards_asked

        def may_go_on(passes: float, share: float = 1.0) -> bool:
            step = passes * one_pass
            return evaluator.layer_forwards_asked + step <= begun + share * (limit - begun)

        oracle = Oracle(slopes_at, losses, examples, may_go_on, min(GRADIENT_PASSES, tries))
        if keep == units.total:
            parts = [partial(may_go_on, share=share) for share in (1 / 2, 3 / 4, 1.0)]
            order, gates = nested_order(oracle, parts, path, units)
        else:
            starts = [frozenset(path[:keep]), frozenset(_whole_layers(path, units)[:keep])]
            start = by_loss(measure(evaluator.losses, starts))[0].layers
            found, gates = guided_set(oracle, start, frozenset(path), units)
        scores = tuple(
            example_scores(example, None, None, [-slope for slope in gradient.slopes])
            for example, gradient in zip(
                evaluator.examples, gradients(gates, examples), strict=True
            )
        )
        if keep != units.total:
            # A stable sort: those that were found come first.
            order = tuple(sorted(rank(means(scores)), key=lambda unit: unit not in found))
        return Choice(order, scores)

    def cost(self, spans: TokenSpans, mask: Mask, units: Units, keep: int) -> float:
        """At most, about; a search that finds nothing better ends earlier."""
        passes = float(self.passes * spans.depth(units.layers))
        return min(passes, _cost_of_search(spans, mask, units, keep))


def _cost_of_search(spans: TokenSpans, mask: Mask, units: Units, keep: int) -> float:
    """What measuring every layer takes; KV heads and orders for any number are not found so."""
    only_gradients = units.of_heads or keep == units.total
    return inf if only_gradients else SEARCH.cost(spans, mask, units, keep)


def _whole_layers(order: Sequence[int], units: Units) -> tuple[int, ...]:
    """An order of units, layer by layer, each where its units stand on average."""
    place = {unit: i for i, unit in enumerate(order)}
    rows = units.rows([place[unit] for unit in range(units.total)])
    return units.of_layers(rank([-fmean(row) for row in rows]))


def _find_at(gates: Gates) -> Find:
    def find(
        runner: ModelRunner, examples: Sequence[Example], advance: Advance
    ) -> list[dict[str, object]]:
        return [gradient_record(one) for one in runner.gate_gradients(examples, gates, advance)]

    return find


GUIDED = Guided(
    "guided",
    "swaps that gate gradients propose and true losses decide, from a short path integral; of few "
    "layers as search, where that costs less",
    needs_gradients=True,
)
