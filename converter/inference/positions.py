"""Which rows of an example a layer has to compute, so that the answer comes out exactly.

A row is what a layer computes of one token; its number is the token's position. Four facts make
most rows superfluous:

- Rows below window + sinks see all that is before them in sliding layers too: they are the same
  under every plan, so all plans share them (the common rows).
- The output head looks at the rows that predict answer tokens only.
- A recurrent layer needs every row below it, and of the rows before them one state.
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
from converter.model.mask import FULL, LINEAR, SLIDING, Mask

# Beside FULL, a layer whose attention adds nothing; for the sensitivity control only.
NO_ATTENTION = "no_attention"

# The type of every layer that a plan is about, lowest first; or of every layer of the model.
LayerTypes = tuple[str, ...]


@dataclass(frozen=True)
class TokenSpans:
    """Where an example's rows lie.

    Attributes:
        common: rows below it are the same under every plan.
        answer: the first row whose prediction is looked at: that of the first answer token.
        end: one past the last row; the last answer token is predicted, never read.
        kinds: what each layer is in the model itself; empty where all attend fully.
    """

    common: int
    answer: int
    end: int
    prompt: int
    kinds: LayerTypes = ()

    def whole(self, layer_types: LayerTypes) -> LayerTypes:
        """The type of every layer of the model, from those that a plan is about."""
        if len(layer_types) == len(self.kinds) or not self.kinds:
            return layer_types
        of_plan = iter(layer_types)
        return tuple(next(of_plan) if kind == FULL else kind for kind in self.kinds)

    def depth(self, layers: int) -> int:
        """All layers of the model, of which a plan is about so many."""
        return len(self.kinds) or layers


def token_spans(
    example: Example, mask: Mask, plans: Sequence[LayerTypes] = (), kinds: LayerTypes = ()
) -> TokenSpans:
    """Where the rows of one example lie, in a model with such layers.

    Plans in which a layer's attention is missing have no rows in common with others.
    """
    prompt = len(example.prompt)
    absent = any(NO_ATTENTION in layer_types for layer_types in plans)
    same = 0 if absent else mask.window_tokens + mask.sink_tokens
    end = prompt + len(example.answer) - 1
    return TokenSpans(min(same, prompt - 1), prompt - 1, end, prompt, kinds)


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
    for layer_type in reversed(spans.whole(layer_types)):
        if layer_type == SLIDING and not mask.full_attention_decode:
            first = max(spans.common, first - mask.window_tokens + 1)
        elif layer_type != NO_ATTENTION:
            first = spans.common
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
    plans = [spans.whole(plan) for plan in plans]
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
    depth = len(spans.whole(plans[0]))
    rows = spans.common * (depth - 1) + sum(_rows_of_branches(plans, spans, mask))
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
    return ((spans.depth(layers) - 1) * spans.prompt + min(last, spans.prompt)) / spans.end


def gradient_layer_forwards(layer_types: LayerTypes, spans: TokenSpans, mask: Mask) -> float:
    """What gate gradients cost, in layer-forwards; the types are those of `gate_layer_types`."""
    firsts, types = first_rows(layer_types, spans, mask), spans.whole(layer_types)
    back = (_first_run(kind, *ends) for kind, *ends in zip(types, firsts, firsts[1:], strict=False))
    return len(types) + sum(2 * (spans.end - first) for first in back) / spans.end


def _first_run(layer_type: str, below: int, above: int) -> int:
    """The first row that a layer runs, of those that come from below and are needed above."""
    return below if layer_type == LINEAR else above


def _rows_of_branches(plans: Sequence[LayerTypes], spans: TokenSpans, mask: Mask) -> Iterator[int]:
    """For each layer, the rows that it runs for all different beginnings of the plans."""
    firsts = {spans.whole(plan): first_rows(plan, spans, mask) for plan in plans}
    for layer in range(len(spans.whole(plans[0]))):
        branches: dict[LayerTypes, int] = {}
        for plan, first in firsts.items():
            branch = plan[: layer + 1]
            run = _first_run(plan[layer], first[layer], first[layer + 1])
            branches[branch] = max(spans.end - run, branches.get(branch, 0))
        yield sum(branches.values())
