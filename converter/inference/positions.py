"""Which rows of an example a layer has to compute, so that the answer comes out exactly.

A row is what a layer computes of one token; its number is the token's position. Three facts make
most rows superfluous:

- Rows below window + sinks see all that is before them in sliding layers too: they are the same
  under every plan, so all plans share them (the common rows).
- The output head looks at the rows that predict answer tokens only.
- A sliding layer's row needs window rows of the layer below (and the sinks, which are common rows).
  So above the last full layer of a plan only a cone that ends in the answer is needed. Under
  full_attention_decode generated rows look everywhere, so nothing is left out there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from converter.common.errors import DataError
from converter.inference.example import Example
from converter.model.mask import FULL, SLIDING, Mask

# Beside FULL, a layer whose attention adds nothing; for the sensitivity control only.
NO_ATTENTION = "no_attention"

# The type of every layer, lowest first.
LayerTypes = tuple[str, ...]


@dataclass(frozen=True)
class TokenSpans:
    """Where an example's rows lie.

    Attributes:
        common: rows below it are the same under every plan.
        answer: the first row whose prediction is looked at: that of the first answer token.
        end: one past the last row; the last answer token is predicted, never read.
    """

    common: int
    answer: int
    end: int
    prompt: int


def token_spans(example: Example, mask: Mask, plans: Sequence[LayerTypes] = ()) -> TokenSpans:
    """Where the rows of one example lie.

    Plans in which a layer's attention is missing have no rows in common with others.
    """
    prompt = len(example.prompt)
    absent = any(NO_ATTENTION in layer_types for layer_types in plans)
    same = 0 if absent else mask.window_tokens + mask.sink_tokens
    return TokenSpans(min(same, prompt - 1), prompt - 1, prompt + len(example.answer) - 1, prompt)


def check_prompt(example: Example, mask: Mask) -> None:
    """Refuse an example that cannot be walked: sinks are taken from the common rows.

    Raises:
        DataError: the prompt has a single token, or no more than there are sinks.
    """
    least = 1 + max(1, mask.sink_tokens)
    if len(example.prompt) < least:
        raise DataError(
            "the prompt is too short",
            expected=f"at least {least} tokens",
            got=f"{len(example.prompt)} tokens",
        )


def first_rows(layer_types: LayerTypes, spans: TokenSpans, mask: Mask) -> tuple[int, ...]:
    """The first row that each layer must be given, and last, the first that the head must be.

    Common rows are never counted: every plan has them.
    """
    first = spans.answer
    firsts = [first]
    for layer_type in reversed(layer_types):
        if layer_type == FULL or (layer_type == SLIDING and mask.full_attention_decode):
            first = spans.common
        elif layer_type == SLIDING:
            first = max(spans.common, first - mask.window_tokens + 1)
        firsts.append(first)
    return tuple(reversed(firsts))


def widest_rows(plans: Sequence[LayerTypes], spans: TokenSpans, mask: Mask) -> int:
    """The most rows that branches of the plans hold between two layers, common rows included."""
    return spans.common + max(_rows_of_branches(plans, spans, mask))


class BranchOfPlans(Protocol):
    """Plans that agree so far."""

    @property
    def plans(self) -> tuple[int, ...]:
        """Their indices in the list."""


AnyBranch = TypeVar("AnyBranch", bound=BranchOfPlans)


def in_groups(
    branches: list[AnyBranch], count: int, leader: int | None = None
) -> list[list[AnyBranch]]:
    """Which branches run together on the way up, at most so many; the first group goes first.

    The branch that will fork most goes last, as nothing waits for it then; the leader's is first.
    """
    if len(branches) > count:
        branches = sorted(branches, key=lambda b: (leader not in b.plans, len(b.plans)))
    return [branches[begin : begin + count] for begin in range(0, len(branches), count)]


@dataclass(frozen=True)
class _Counted:
    """A branch of which only the rows count."""

    plans: tuple[int, ...]
    rows: int


def rows_held(plans: Sequence[LayerTypes], spans: TokenSpans, mask: Mask, together: int) -> int:
    """The most rows of hidden states there are at a time when few branches go up together.

    Those that a layer is given and those that it gives, the common ones, and all that wait.
    """
    firsts = [first_rows(plan, spans, mask) for plan in plans]

    def branch(some: Sequence[int], layer: int) -> _Counted:
        return _Counted(tuple(some), spans.end - min(firsts[plan][layer] for plan in some))

    waiting = [(0, [branch(range(len(plans)), 0)])]
    most = 0
    while waiting:
        layer, below = waiting.pop()
        if layer == len(plans[0]):
            continue
        above = []
        for one in below:
            kinds = dict.fromkeys(plans[plan][layer] for plan in one.plans)
            for kind in kinds:
                same = [plan for plan in one.plans if plans[plan][layer] == kind]
                above.append(branch(same, layer + 1))
        at_rest = sum(one.rows for _, group in waiting for one in group)
        most = max(most, at_rest + sum(one.rows for one in [*below, *above]))
        waiting += [(layer + 1, group) for group in reversed(in_groups(above, together))]
    return 2 * spans.common + most


def layer_forwards(plans: Sequence[LayerTypes], spans: TokenSpans, mask: Mask) -> float:
    """What evaluating the plans together costs, in runs of one layer over one whole example."""
    # Of the common rows the last layer only needs the keys.
    rows = spans.common * (len(plans[0]) - 1) + sum(_rows_of_branches(plans, spans, mask))
    return rows / spans.end


def divergence_layer_forwards(
    plans: Sequence[LayerTypes], spans: TokenSpans, mask: Mask, *, every_row: bool
) -> float:
    """What holding plans against the full-attention model costs, in layer-forwards.

    The output head is not in it. For every row of a long example it costs as much as a few layers.
    """
    if every_row:
        spans = replace(spans, answer=spans.common)
    return layer_forwards([(FULL,) * len(plans[0]), *plans], spans, mask)


def mass_layer_forwards(spans: TokenSpans, layers: int, last: int) -> float:
    """What weighing the attention of the `last` prompt rows costs, in layer-forwards.

    Only the prompt is run, and of the last layer only those rows.
    """
    return ((layers - 1) * spans.prompt + min(last, spans.prompt)) / spans.end


def gradient_layer_forwards(layer_types: LayerTypes, spans: TokenSpans, mask: Mask) -> float:
    """What gate gradients cost, in layer-forwards; the types are those of `gate_layer_types`."""
    firsts = first_rows(layer_types, spans, mask)
    return len(layer_types) + sum(2 * (spans.end - first) for first in firsts[1:]) / spans.end


def _rows_of_branches(plans: Sequence[LayerTypes], spans: TokenSpans, mask: Mask) -> Iterator[int]:
    """For each layer, the rows that come out of it for all different beginnings of the plans."""
    firsts = {plan: first_rows(plan, spans, mask) for plan in plans}
    for layer in range(len(plans[0])):
        branches: dict[LayerTypes, int] = {}
        for plan, first in firsts.items():
            branch = plan[: layer + 1]
            branches[branch] = max(spans.end - first[layer + 1], branches.get(branch, 0))
        yield sum(branches.values())
