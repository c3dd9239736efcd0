"""Beam search: several sets grow side by side, so that one early mistake does not decide.

Greedy search is all but a beam of one. Each member is extended by the layers worth measuring for it
(see `converter.calibration.search.changes`), and the best sets of a count make up the next beam.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from converter.calibration.search.changes import Change, worth_measuring
from converter.calibration.search.oracle import Candidate, Losses, by_loss, measure


@dataclass(frozen=True)
class _Member:
    """A set of the beam, and what adding each other layer was last seen to do."""

    now: Candidate
    changes: Mapping[int, Change]


def beam(losses: Losses, total: int, upto: int, width: int) -> tuple[Candidate, ...]:
    """The best set found of 0, 1, ... `upto` layers; they need not be nested.

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
