"""Searches that are as good as greedy search, for more: beam and evolution."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum

from converter.calibration.evaluator import PlanEvaluator
from converter.calibration.scores import means, rank
from converter.calibration.selectors.base import Choice, Selector
from converter.calibration.selectors.one_layer import NLL_RESTORE
from converter.calibration.selectors.search import (
    Change,
    Losses,
    MeasuredSet,
    by_loss,
    choice_around,
    greedy_cost,
    greedy_order,
    measure,
    typical_cost,
    worth_measuring,
)
from converter.inference.positions import TokenSpans
from converter.model.mask import Mask
from converter.plan.units import Units

# --- beam: several sets grow side by side, so that one early mistake does not decide ------------

_WIDTH = 4


@dataclass(frozen=True)
class _Member:
    """A set of the beam, and what adding each other layer was last seen to do."""

    now: MeasuredSet
    changes: Mapping[int, Change]


def beam(losses: Losses, total: int, upto: int, width: int) -> tuple[MeasuredSet, ...]:
    """The best set found of 0, 1, ... `upto` layers; they need not be nested.

    Greedy search is all but a beam of one. Each member is extended by the layers worth measuring
    for it, and the best sets of a count make up the next beam.

    Args:
        losses: the oracle.
        total: layers of the model.
        upto: the largest count.
        width: how many sets of each count are extended.
    """
    unknown = {layer: Change(0.0, -1) for layer in range(total)}
    # One call for the empty set and for what the first step asks.
    singles = [frozenset({layer}) for layer in range(total)]
    members = [_Member(measure(losses, [frozenset(), *singles])[0], unknown)]
    best = [members[0].now]
    for step in range(upto):
        members = _extended(losses, members, step)[:width]
        best.append(members[0].now)
    return tuple(best)


def _extended(losses: Losses, members: list[_Member], step: int) -> list[_Member]:
    """All sets that the members were extended to, the best first, each once."""
    trials = [
        list(member.changes) if step == 0 else worth_measuring(member.changes) for member in members
    ]
    sets = [
        member.now.layers | {layer}
        for member, layers in zip(members, trials, strict=True)
        for layer in layers
    ]
    measured = {one.layers: one for one in measure(losses, sets)}
    children: dict[frozenset[int], _Member] = {}
    for member, layers in zip(members, trials, strict=True):
        after = {layer: measured[member.now.layers | {layer}] for layer in layers}
        changes = dict(member.changes)
        for layer, child in after.items():
            changes[layer] = Change(child.loss - member.now.loss, step)
        for layer, child in after.items():
            others = {other: change for other, change in changes.items() if other != layer}
            # Reached from several members, a set takes over what the best of them knows.
            children.setdefault(child.layers, _Member(child, others))
    return [children[one.layers] for one in by_loss(member.now for member in children.values())]


class Beam(Selector):
    """As greedy, with several sets side by side."""

    def choose(self, evaluator: PlanEvaluator, keep: int) -> Choice:
        """The best set of the last beam."""
        found = beam(evaluator.losses, evaluator.total, keep, _WIDTH)[keep]
        return choice_around(evaluator, found.layers)

    def cost(self, spans: TokenSpans, mask: Mask, units: Units, keep: int) -> float:
        """A guess: at most a greedy search for each set of the beam."""
        return _WIDTH * greedy_cost(spans, mask, units, keep)


# --- evolution: random swaps of a good set, thinned out on ever more examples -------------------

# The oracle over the first so many examples.
PartialLosses = Callable[[Sequence[frozenset[int]], int], Sequence[float]]

_GENERATIONS = 16
_OFFSPRING = 32
# Of the offspring and of the examples, what a stage keeps and what the stage before it looks at.
_THIN = 4
# Draws for one offspring before giving up on finding a set that has not been measured.
_DRAWS = 20


def evolve(
    losses: PartialLosses,
    starts: Sequence[frozenset[int]],
    total: int,
    *,
    examples: int,
    generations: int,
    offspring: int = _OFFSPRING,
    seed: int = 0,
) -> MeasuredSet:
    """Search from the best of the given sets; the number of layers stays.

    After EvoPress (arXiv 2410.14649), which searches how strongly to compress each layer: a
    generation is the parent and its mutations, mutations switch levels so that the budget holds,
    and selection is by stages, many offspring on few examples and few on all. Here a level switch
    gives one layer full attention and takes it from another.

    A set replaces the parent only when its loss on all examples is lower. It ends early when no set
    is drawn that has not been measured on all examples.

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
    sizes = {len(layers) for layers in starts}
    if len(sizes) != 1:
        raise ValueError(f"the sets to start from must have one size, and have {sorted(sizes)}")
    rng = random.Random(seed)  # noqa: S311 (reproducible on purpose)
    on_all = _over(losses, examples)
    beginning = measure(on_all, starts)
    finished = {one.layers for one in beginning}
    parent = by_loss(beginning)[0]
    for _ in range(generations):
        drawn = _offspring(parent.layers, total, offspring, finished, rng)
        if not drawn:
            break
        finalists = measure(on_all, _thinned(losses, drawn, examples))
        finished.update(one.layers for one in finalists)
        best = by_loss(finalists)[0]
        parent = best if best.loss < parent.loss else parent
    return parent


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


class Evolution(Selector):
    """Random swaps of the restore-one choice, thinned out on ever more examples."""

    def choose(self, evaluator: PlanEvaluator, keep: int) -> Choice:
        """The last parent."""
        scores = means(NLL_RESTORE.scores(evaluator, range(evaluator.total)))

        def losses(sets: Sequence[frozenset[int]], examples: int) -> list[float]:
            by_set = evaluator.answers(sets, end=examples)
            return [fsum(answer.nll for answer in answers) / len(answers) for answers in by_set]

        found = evolve(
            losses,
            [frozenset(rank(scores)[:keep])],
            evaluator.total,
            examples=len(evaluator.examples),
            generations=_GENERATIONS,
        )
        return choice_around(evaluator, found.layers)

    def cost(self, spans: TokenSpans, mask: Mask, units: Units, keep: int) -> float:
        """A guess: of the offspring all are run on a 16th of the examples, few on more."""
        sets = 2 * units.total + 2 + _GENERATIONS * _OFFSPRING * 3 / 16
        return typical_cost(spans, mask, sets, units, keep)


class Greedy(Selector):
    """The layer that helps most beside those chosen already, again and again."""

    def choose(self, evaluator: PlanEvaluator, keep: int) -> Choice:
        """The first layers of a greedy order."""
        order = greedy_order(evaluator.losses, evaluator.total, keep)
        return choice_around(evaluator, frozenset(order[:keep]), order)

    def cost(self, spans: TokenSpans, mask: Mask, units: Units, keep: int) -> float:
        """As `greedy_cost`."""
        return greedy_cost(spans, mask, units, keep)


GREEDY = Greedy(
    "greedy", "one layer after another, the one that helps most beside those chosen before"
)
BEAM = Beam("beam", f"as greedy, with {_WIDTH} sets side by side", nested=False)
EVOLUTION = Evolution(
    "evolution",
    "random swaps of the restore-one choice, kept where they help (as EvoPress)",
    nested=False,
)
