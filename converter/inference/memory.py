"""How to run a model within the memory there is, by a formula over sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import prod

from converter.common.devices import Room
from converter.common.errors import UsageError
from converter.common.units import human_bytes
from converter.inference.example import Example
from converter.inference.positions import (
    LayerTypes,
    TokenSpans,
    first_rows,
    rows_held,
    token_spans,
    widest_rows,
)
from converter.model.mask import FULL, SLIDING, Mask
from converter.model.source import Source
from converter.plan.units import Units, switched_plans

_DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# Layers on the device at a time when they are streamed: at work, and read ahead.
_STREAMED_LAYERS = 2
# Reading all weights again for fewer examples than this costs more than the disk does.
_FEWEST_TOGETHER = 8
# So many plans at once are enough to share most of the work; more of them wait in more memory.
_FEW_PLANS = 8
# More rows at once than the first of these gain little; fewer take less memory.
_BATCHES = (4096, 1024, 256)
# Of the blocks in which a window is computed, in attention_hybrid.py.
_BLOCK_ROWS = 128
# Where hidden states wait while it is another example's turn, the fastest first.
DEVICE, HOST, DISK = "in memory", "in main memory", "on disk"


@dataclass(frozen=True)
class MemoryPlan:
    """How the layers and the hidden states are kept.

    Attributes:
        streamed: layers are read from disk in turn; else all stay on the device.
        group: how many examples run together.
        waiting: where hidden states are while it is another example's turn.
        plans: at most so many are run together, layer by layer; None for all.
        batch_rows: at most so many rows run through a layer at once, if that leaves one branch.
        why: one sentence for the user.
    """

    streamed: bool
    group: int
    waiting: str
    plans: int | None
    batch_rows: int
    why: str


RESIDENT = MemoryPlan(False, 1, DEVICE, None, _BATCHES[0], "the whole model in memory")


@dataclass(frozen=True)
class Workload:
    """What a measurement runs.

    Attributes:
        source: the model.
        mask: what sliding layers see.
        dtype: of weights and hidden states, as torch calls it.
        examples: how many there are.
        prompt_tokens, answer_tokens: of the longest of them.
        gradient: whether the way leads back, from the loss to the gates.
        plans_together: at most so many, where layers are read in turn; None for all.
    """

    source: Source
    mask: Mask
    dtype: str
    examples: int
    prompt_tokens: int
    answer_tokens: int
    gradient: bool
    plans_together: int | None = None

    @cached_property
    def spans(self) -> TokenSpans:
        """Where the rows of the longest example lie."""
        tokens = (0,) * self.prompt_tokens, (0,) * self.answer_tokens
        return token_spans(Example(*tokens, "longest"), self.mask, kinds=self.source.shape.kinds)

    @cached_property
    def plans(self) -> list[LayerTypes]:
        """What scoring every layer asks at once; no selector asks more."""
        layers = Units(len(self.source.shape.full_layers))
        return switched_plans(FULL, layers, range(layers.total))

    @property
    def value_bytes(self) -> int:
        """Of a number."""
        return _DTYPE_BYTES[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Of a token's hidden state."""
        return self.source.shape.hidden * self.value_bytes

    @property
    def keys_bytes(self) -> int:
        """Of a token's keys and values in one layer, of the kind that makes more of them."""
        shape = self.source.shape
        most = max(shape.kv_bytes_per_token, shape.own_kv_bytes_per_token)
        return most // shape.kv_bytes_per_value * self.value_bytes

    @cached_property
    def layers_bytes(self) -> list[int]:
        """Of each layer's weights."""
        tensors, layers = self.source.layer_tensors, self.source.shape.layers
        sizes = [sum(map(prod, tensors(index).values())) for index in range(layers)]
        return [size * self.value_bytes for size in sizes]

    @cached_property
    def weight_bytes(self) -> int:
        """Of all weights."""
        return sum(map(prod, self.source.weights.shapes.values())) * self.value_bytes

    @cached_property
    def waiting_bytes(self) -> int:
        """Of one example's states between two layers, when all its branches wait."""
        if self.gradient:
            return self._kept_for_the_way_back()
        rows = widest_rows(self.plans, self.spans, self.mask)
        if self.plans_together is not None:
            own = self.spans.end - self.spans.common
            rows = min(rows, self.spans.common + self.plans_together * own)
        return rows * self.row_bytes

    @property
    def held_bytes(self) -> int:
        """Of what an example has on the device wherever its states wait."""
        return 2 * self.spans.end * self.row_bytes if self.gradient else 0

    @cached_property
    def resident_bytes(self) -> dict[int, int]:
        """What one example takes when few branches go up at a time, by the rows of a batch."""
        batches = sorted({max(rows, self.spans.end) for rows in _BATCHES}, reverse=True)
        if self.gradient:
            kept = self.waiting_bytes + self.turn_bytes(self.spans.end)
            return dict.fromkeys(batches, kept)
        common = self.source.shape.layers * self.spans.common * self.keys_bytes
        together = {rows: rows // self.spans.end for rows in batches}
        held = {n: rows_held(self.plans, self.spans, self.mask, n) for n in {*together.values()}}
        return {
            rows: held[together[rows]] * self.row_bytes + common + self.work_bytes(rows)
            for rows in batches
        }

    def _kept_for_the_way_back(self) -> int:
        """Every layer's input where a gradient reaches, and below that its keys."""

        def kept(kind: str) -> int:
            plan = (kind,) * len(self.source.shape.full_layers)
            firsts = first_rows(plan, self.spans, self.mask)[:-1]
            rows = sum(self.spans.end - first for first in firsts)
            return rows * self.row_bytes + sum(firsts) * self.keys_bytes

        return max(kept(FULL), kept(SLIDING))

    def turn_bytes(self, rows: int) -> int:
        """What the example at work takes beside weights, so many rows at once on the way up."""
        if self.gradient:
            return max(self.held_bytes + self.work_bytes(rows), self._back_bytes())
        return self.work_bytes(rows) + 2 * self.waiting_bytes

    def _back_bytes(self) -> int:
        """What a layer takes on the way back: what it computes of a row stays until it is there.

        The factors are those that fit what was measured (benchmarks/scoring.md).
        """
        shape = self.source.shape
        heads, kv_heads = (n * shape.head_dim for n in (shape.heads, shape.kv_heads))
        # Of both kinds of attention and their mixture; of the feed-forward block; of hidden states.
        wide = 8 * (heads + kv_heads) + 6 * shape.intermediate + 4 * shape.hidden
        # Blocks of a window share keys and values, but gradients want each one's own.
        copies = 2 * kv_heads * (1 + self.mask.window_tokens // _BLOCK_ROWS)
        return (self.spans.end - self.spans.common) * (wide + copies) * self.value_bytes

    def work_bytes(self, rows: int) -> int:
        """What a layer at work on so many rows takes beside its weights, or the output head."""
        shape = self.source.shape
        # Queries, keys, values and outputs; gate, up and their product; hidden states and norms.
        wide = 2 * shape.heads * shape.head_dim + 4 * shape.kv_heads * shape.head_dim
        layer = rows * (wide + 3 * shape.intermediate + 4 * shape.hidden) * self.value_bytes
        answer = self.spans.end - self.spans.answer
        head = 4 * answer * shape.vocabulary * max(self.value_bytes, 4)
        return max(layer, head)


def plan_memory(workload: Workload, room: Room) -> MemoryPlan:
    """Pick the fastest way that fits into the room.

    Raises:
        UsageError: nothing fits; it says how much would, and what would make it fit.
    """
    if fitting := _fitting(workload, room):
        return fitting
    last = _streamed_ways(workload)[-1]
    streamed = min(_streaming_bytes(last, rows) for rows in workload.resident_bytes)
    # Of long examples so many branches may wait that the whole model takes less.
    least = min(streamed + workload.held_bytes, _whole_bytes(workload))
    raise UsageError(
        "the model cannot be scored in so little memory, not even layer by layer",
        where="--memory" if room.asked else "--device",
        expected=_at_least(room.whole_bytes(least)),
        got=room.told,
        next_step=_what_would_fit(workload, room),
    )


def plan_spread(workload: Workload, room: Room) -> MemoryPlan:
    """The plan of a model that is spread over devices, which only goes whole.

    Raises:
        UsageError: all devices together are too small.
    """
    fitting = _fitting(workload, room)
    if fitting is None or fitting.streamed:
        raise UsageError(
            "the model does not fit, even spread over all devices",
            where="--device spread",
            expected=_at_least(room.whole_bytes(_whole_bytes(workload))),
            got=room.told,
            next_step="leave --device spread out: layers are then read in turn, onto one device",
        )
    return fitting


def _at_least(count: int) -> str:
    # Rounded up, so that what is named is enough.
    return f"at least {count // 2**20 + 1} MiB"


def _whole_bytes(workload: Workload) -> int:
    """The least with which all layers are on the device."""
    return workload.weight_bytes + min(workload.resident_bytes.values())


def _streaming_bytes(workload: Workload, batch_rows: int) -> int:
    """What is on the device beside examples that wait, when layers are read in turn."""
    # The first layer is loaded with what stands around the layers, for its class.
    few = workload.source.shape.first_of_every_kind
    ends = workload.weight_bytes - sum(workload.layers_bytes[few:])
    weights = ends + _STREAMED_LAYERS * max(workload.layers_bytes)
    return weights + workload.turn_bytes(batch_rows)


def _fitting(workload: Workload, room: Room) -> MemoryPlan | None:
    for rows, work in workload.resident_bytes.items():
        if workload.weight_bytes + work <= room.free_bytes:
            why = f"the whole model fits into {room.told}"
            return MemoryPlan(False, 1, DEVICE, None, rows, why)
    layers, layer = workload.source.shape.layers, human_bytes(max(workload.layers_bytes))
    how = f"{layers} layers of {layer}, read in turn within {room.told}"
    for where, all_or_few in product((DEVICE, HOST, DISK), _streamed_ways(workload)):
        for rows in all_or_few.resident_bytes:
            left = room.free_bytes - _streaming_bytes(all_or_few, rows)
            group, on_disk = (_together(all_or_few, room, left, place) for place in (where, DISK))
            # Where no more would fit together on disk, main memory is the faster place.
            most = workload.examples if where == DEVICE else on_disk
            if group >= max(1, 1 if where == DISK else min(_FEWEST_TOGETHER, most)):
                why = f"{how}; {group} examples together, waiting {where}"
                return MemoryPlan(True, group, where, all_or_few.plans_together, rows, why)
    return None


def _streamed_ways(workload: Workload) -> list[Workload]:
    """All plans at once, or few, which are more runs of what they share."""
    few = [] if workload.gradient else [replace(workload, plans_together=_FEW_PLANS)]
    return [workload, *few]


def _together(workload: Workload, room: Room, left: int, where: str) -> int:
    """How many examples there may be at once, with so much left on the device."""
    group, waiting, held = workload.examples, workload.waiting_bytes, workload.held_bytes
    on_device = held + waiting if where == DEVICE else held
    if left < on_device:
        return 0
    if on_device:
        group = min(group, left // on_device)
    if where == HOST:
        # Pinned memory is handed out in powers of two.
        group = min(group, (room.host_bytes or 0) // (2 * waiting))
    return group


def _what_would_fit(workload: Workload, room: Room) -> str:
    """The changes of which each by itself would do."""
    ways = [way for way, other in _smaller(workload) if _fitting(other, room)]
    halves = [workload.prompt_tokens >> n for n in range(1, workload.prompt_tokens.bit_length())]
    for tokens in halves:
        if _fitting(replace(workload, prompt_tokens=tokens), room):
            ways.append(f"--length {tokens}")
            break
    more = "--memory with more" if room.asked else "a device with more memory"
    return f"use {' or '.join([*ways, more])}"


def _smaller(workload: Workload) -> Iterator[tuple[str, Workload]]:
    if workload.value_bytes > _DTYPE_BYTES["bfloat16"]:
        yield "--dtype bfloat16", replace(workload, dtype="bfloat16")
    if workload.gradient:
        yield "a --method without gradients, such as nll-restore", replace(workload, gradient=False)
