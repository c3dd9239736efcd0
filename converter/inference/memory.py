"""How to run a model within a given amount of memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from converter.common.errors import UsageError
from converter.common.files import output_errors
from converter.common.units import human_bytes
from converter.inference.positions import LayerTypes, TokenSpans, widest_rows
from converter.model.mask import Mask
from converter.model.source import Source

if TYPE_CHECKING:
    import torch

_DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# Layers in memory at a time when they are streamed: at work, and read ahead.
_STREAMED_LAYERS = 2
# What the allocator and the libraries take beside what can be counted, of the whole.
_SLACK = 0.1
# Reading all weights again for fewer examples than this costs more than the disk does.
_FEWEST_TOGETHER = 8


@dataclass(frozen=True)
class MemoryPlan:
    """How the layers and the hidden states are kept.

    Attributes:
        streamed: layers are read from disk in turn; else all stay in memory.
        group: how many examples run together.
        offloaded: hidden states wait on disk while it is another example's turn.
        batch_rows: at most so many rows run through a layer at once, if that leaves one branch.
        why: one sentence for the user.
    """

    streamed: bool
    group: int
    offloaded: bool
    batch_rows: int
    why: str


# More rows at once than the first of these gain little; fewer take less memory.
_BATCHES = (4096, 1024, 256)
RESIDENT = MemoryPlan(False, 1, False, _BATCHES[0], "the whole model in memory")


@dataclass(frozen=True)
class ActivationFootprint:
    """Rows of hidden states that a measurement keeps of one example, between layers.

    Attributes:
        resting: while it is another example's turn.
        resting_offloaded: the same, in memory, when the rest is on disk.
        working: while it is this one's turn.
    """

    resting: int
    resting_offloaded: int
    working: int


def footprint_of_plans(
    plans: Sequence[LayerTypes], spans: TokenSpans, mask: Mask
) -> ActivationFootprint:
    """What a forward pass under several plans keeps."""
    rows = widest_rows(plans, spans, mask)
    return ActivationFootprint(rows, 0, 2 * rows)


def footprint_of_gradients(layers: int, spans: TokenSpans) -> ActivationFootprint:
    """What a pass forward and back keeps: each layer's input, and the last one's output."""
    return ActivationFootprint((layers + 2) * spans.end, 2 * spans.end, 2 * spans.end)


def plan_memory(
    source: Source,
    dtype: str,
    examples: int,
    spans: TokenSpans,
    footprint: ActivationFootprint,
    memory_bytes: int,
) -> MemoryPlan:
    """Pick the fastest way that fits in what the process may take in all.

    The spans and the footprint are those of the longest of the examples.

    Raises:
        UsageError: nothing fits; it says how much would.
    """
    size, shape = _DTYPE_BYTES[dtype], source.shape
    row = shape.hidden * size
    tensors = partial(source.family.layer_tensors, source.config, shape)
    sizes = [sum(map(prod, tensors(index).values())) * size for index in range(shape.layers)]
    layer = max(sizes)
    whole = sum(map(prod, source.weights.shapes.values())) * size
    # One whole layer is loaded with what stands around the layers, for its class.
    ends = whole - sum(sizes[1:])
    free = int(memory_bytes * (1 - _SLACK)) - process_bytes()
    allowed = human_bytes(memory_bytes)
    batches = sorted({max(rows, spans.end) for rows in _BATCHES}, reverse=True)
    work = {
        rows: _work_bytes(source, size, spans, rows) + footprint.working * row for rows in batches
    }
    for rows in batches:
        if whole + work[rows] + footprint.resting * row <= free:
            return MemoryPlan(False, 1, False, rows, f"the whole model fits into {allowed}")
    how = f"{shape.layers} layers of {human_bytes(layer)}, read in turn within {allowed}"
    left = free - ends - _STREAMED_LAYERS * layer
    offloaded = footprint.resting_offloaded * row
    for each, fewest, where in (
        (footprint.resting * row, min(_FEWEST_TOGETHER, examples), "in memory"),
        (offloaded, 1, "waiting on disk"),
    ):
        for rows in batches:
            rest = left - work[rows]
            group = min(rest // each, examples) if each else examples * (rest >= 0)
            if group >= fewest:
                why = f"{how}; {group} examples together, {where}"
                return MemoryPlan(True, group, where == "waiting on disk", rows, why)
    least = (memory_bytes * (1 - _SLACK) - left + work[batches[-1]] + offloaded) / (1 - _SLACK)
    raise UsageError(
        "the model cannot be scored in so little memory, not even layer by layer",
        where="--memory",
        # Rounded up, so that what is named is enough.
        expected=f"at least {int(least) // 2**20 + 1} MiB",
        got=allowed,
        next_step="allow more, shorten the prompts (--length), or use --dtype bfloat16",
    )


def _work_bytes(source: Source, size: int, spans: TokenSpans, rows: int) -> int:
    """What one layer at work on so many rows takes beside its weights, or the output head."""
    shape = source.shape
    # Queries, keys, values and outputs; gate, up and their product; hidden states and norms.
    wide = 2 * shape.heads * shape.head_dim + 4 * shape.kv_heads * shape.head_dim
    layer = rows * (wide + 3 * shape.intermediate + 4 * shape.hidden) * size
    head = 4 * (spans.end - spans.answer) * shape.vocabulary * max(size, 4)
    return max(layer, head)


def process_bytes() -> int:
    """What this process has in memory now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


class ActivationStore:
    """Tensors that wait in memory, by name."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]] = {}

    def put(self, name: str, tensors: dict[str, torch.Tensor], note: dict[str, str]) -> None:
        """Keep tensors under a name, instead of those that it had.

        Of a view only its own part is kept, not all that it is a view of.
        """
        self._kept[name] = {key: _own(tensor) for key, tensor in tensors.items()}, note

    def note(self, name: str) -> dict[str, str] | None:
        """What was noted with the tensors of a name; None when there are none."""
        return self._kept[name][1] if name in self._kept else None

    def get(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The tensors of a name, and what was noted with them."""
        return self._kept[name]

    def drop(self, name: str) -> None:
        """Forget a name."""
        self._kept.pop(name, None)


class ActivationOffload(ActivationStore):
    """Tensors that wait in a folder, which is made when it is missing, for a device."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        with output_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._device = str(device)

    def put(self, name: str, tensors: dict[str, torch.Tensor], note: dict[str, str]) -> None:
        """Write tensors under a name, whole or not at all.

        Raises:
            OutputError: the disk is full or gone.
        """
        from safetensors.torch import save

        path = self._path(name)
        partial = path.with_suffix(".partial")
        with output_errors(path):
            partial.write_bytes(save({k: t.contiguous() for k, t in tensors.items()}, note))
            partial.replace(path)

    def note(self, name: str) -> dict[str, str] | None:
        """What was noted with the tensors of a name; None when there are none."""
        from safetensors import safe_open

        if not self._path(name).exists():
            return None
        with safe_open(self._path(name), framework="pt") as file:
            return dict(file.metadata())

    def get(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The tensors of a name, and what was noted with them."""
        from safetensors import safe_open

        with safe_open(self._path(name), framework="pt", device=self._device) as file:
            # Copied, not mapped: the file may be replaced while the tensors are in use.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata())

    def drop(self, name: str) -> None:
        """Forget a name."""
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"
