"""A GGUF that hybridize wrote, read back and checked."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from converter.common.errors import GgufError, PlanError
from converter.engines.gguf.architecture import HONOURING, HONOURING_ARCHS, PATTERN, WINDOW
from converter.engines.gguf.container import Container, read_container
from converter.engines.gguf.llama_cpp import (
    CACHE_TYPES,
    LlamaCppSettings,
    full_cells,
    sliding_cells,
)
from converter.engines.gguf.metadata import PLAN
from converter.model.families.gguf_values import number_of
from converter.model.mask import SLIDING
from converter.plan.plan import Plan, plan_from_json

_SIZES = (
    "block_count",
    "context_length",
    "embedding_length",
    "attention.head_count",
    "attention.head_count_kv",
)
# Sizes beyond these are no model's, and numbers made from them would not fit.
_LARGEST = 1 << 31


@dataclass(frozen=True)
class HybridFile:
    """A file of ours.

    Attributes:
        container: its metadata and tensors.
        plan: what it should compute.
        layers, context_tokens: of the model.
        kv_values_per_token: numbers that one layer caches for one token.
        honoured: whether its architecture honours the plan.
    """

    container: Container
    plan: Plan
    layers: int
    context_tokens: int
    kv_values_per_token: int
    honoured: bool

    @property
    def path(self) -> Path:
        """The file."""
        return self.container.path

    @property
    def sliding_layers(self) -> int:
        """How many layers slide."""
        return self.plan.layer_types.count(SLIDING)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.bytes for tensor in self.container.tensors)

    def widened(self) -> dict[str, int]:
        """The override that turns every layer back into full attention."""
        return {f"{self.container.arch}.{WINDOW}": 1 << 20}

    def expected_caches(self, settings: LlamaCppSettings) -> list[tuple[int, int]]:
        """Cells and layers of the caches that the plan promises in llama.cpp."""
        full = self.layers - self.sliding_layers
        if not self.honoured:
            return [(full_cells(settings), self.layers)]
        cells = sliding_cells(self.plan.mask.window_tokens, settings)
        caches = [(full_cells(settings), full), (cells, self.sliding_layers)]
        return [(cells, layers) for cells, layers in caches if layers]

    def cache_bytes(self, settings: LlamaCppSettings) -> int:
        """Keys and values of all layers, in bytes."""
        return self._bytes(self.expected_caches(settings), settings)

    def full_cache_bytes(self, settings: LlamaCppSettings) -> int:
        """The same if no layer slid."""
        return self._bytes([(full_cells(settings), self.layers)], settings)

    def _bytes(self, caches: list[tuple[int, int]], settings: LlamaCppSettings) -> int:
        each = self.kv_values_per_token * CACHE_TYPES[settings.cache_type][1]
        return sum(cells * layers * each for cells, layers in caches)


def open_hybrid(path: Path) -> HybridFile:
    """Read a file of ours, without llama.cpp.

    What would make llama.cpp abort, rather than refuse, is refused here.

    Raises:
        GgufError: it is damaged, is not ours, or contradicts itself.
    """
    container = read_container(path)
    arch, keys = container.arch, container.own_keys()
    if arch not in HONOURING and arch not in HONOURING_ARCHS:
        raise GgufError(
            "this is not a GGUF of an architecture that hybridize knows",
            where=path,
            expected=", ".join(sorted({*HONOURING, *HONOURING_ARCHS})),
            got=repr(arch),
            next_step="run it with llama.cpp itself",
        )
    plan = _plan_of(container)
    sizes = {name: number_of(keys, name) for name in _SIZES}
    for name, size in sizes.items():
        if size is None or not 0 < size < _LARGEST:
            raise GgufError(
                "the GGUF lacks a size", where=path, expected=f"{arch}.{name}", got=size
            )
    layers = sizes["block_count"] or 0
    slides = [kind == SLIDING for kind in plan.layer_types]
    is_dressed = arch in HONOURING_ARCHS and any(slides)
    if is_dressed or PATTERN in keys:
        pattern = keys[PATTERN].value if PATTERN in keys else None
        window = number_of(keys, WINDOW)
        if pattern != slides or window != plan.mask.window_tokens:
            raise GgufError(
                "the GGUF contradicts its plan",
                where=path,
                expected=f"window {plan.mask.window_tokens} in {sum(slides)} of {len(slides)} "
                "layers (hybridize.plan)",
                got=f"{arch}.{WINDOW} {window}, {arch}.{PATTERN} {pattern}",
                next_step="export it again",
            )
    if len(slides) != layers:
        raise GgufError(
            "the GGUF's plan is for a model of another depth",
            where=path,
            expected=f"{layers} layers",
            got=len(slides),
        )
    heads, kv_heads = sizes["attention.head_count"] or 1, sizes["attention.head_count_kv"] or 1
    head_dim = number_of(keys, "attention.key_length", (sizes["embedding_length"] or 0) // heads)
    return HybridFile(
        container,
        plan,
        layers,
        sizes["context_length"] or 0,
        math.prod((2, kv_heads, head_dim or 0)),
        honoured=is_dressed or not any(slides),
    )


def _plan_of(container: Container) -> Plan:
    """The plan that a file carries.

    Raises:
        GgufError: it has none, or one that is damaged.
    """
    value = container.metadata.get(PLAN)
    if value is None or value.kind != "string":
        raise GgufError(
            "this GGUF was not written by hybridize",
            where=container.path,
            expected=f"the key {PLAN}",
            next_step="make one with: hybridize export OUT FILE.gguf",
        )
    try:
        plan = json.loads(value.value)
        if not isinstance(plan, dict):
            raise TypeError("it is not an object")
        return plan_from_json(plan, PLAN)
    except (ValueError, TypeError, RecursionError, PlanError) as error:
        raise GgufError("the GGUF's plan is damaged", where=container.path, got=error) from error
