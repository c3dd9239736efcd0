"""The memory that converting a model takes: a formula over sizes, not a promise.

Time is not foretold: it depends on the machine, and is told from what a run has measured there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converter.common.units import human_bytes
from converter.model.dimensions import ModelDimensions
from converter.model.families.base import Family
from converter.model.mask import Mask
from converter.plan.plan import cache_bytes


@dataclass(frozen=True)
class ExpectedMemory:
    """What converting a model by some settings is expected to take.

    Attributes:
        kv_full_bytes, kv_hybrid_bytes: cache of one sequence of `context_tokens`.
        context_tokens: the model's longest sequence.
        measuring_bytes: accelerator memory while layers are scored.
        proving_bytes: memory of the verification, which holds one copy of the model at a time; with
            less of it, one layer.
        proving_dtype: what that copy is in.
    """

    weight_bytes: int
    kv_full_bytes: int
    kv_hybrid_bytes: int
    context_tokens: int
    measuring_bytes: int
    proving_bytes: int
    proving_dtype: str

    def sentences(self) -> tuple[str, ...]:
        """The figures as a recipe states them."""
        return (
            f"weights {human_bytes(self.weight_bytes)}; "
            f"KV cache of {self.context_tokens:,} tokens {human_bytes(self.kv_hybrid_bytes)} "
            f"instead of {human_bytes(self.kv_full_bytes)}",
            f"measuring about {human_bytes(self.measuring_bytes)} of the device's memory",
            f"proving {human_bytes(self.proving_bytes)} of main memory ({self.proving_dtype})",
        )


def expected_memory(
    config: Mapping[str, Any],
    family: Family,
    dimensions: ModelDimensions,
    mask: Mask,
    full_layers: int,
    prompt_tokens: int,
) -> ExpectedMemory:
    """What calibrating (prompts of at most so many tokens) and proving a model should take."""
    tensors = family.expected_tensors(config, dimensions)
    parameters = sum(math.prod(size) for size in tensors.values())
    weights, tokens = parameters * dimensions.kv_bytes_per_value, dimensions.context_tokens
    # As `verify` chooses: float64 for what then takes at most 4 GiB.
    proving, proving_bytes = ("float64", 8) if parameters * 8 <= 4 << 30 else ("float32", 4)
    # The widest moment of a layer: the MLP's three products, or queries, keys and values.
    attention = 2 * (dimensions.heads + dimensions.kv_heads) * dimensions.head_dim
    widest = 4 * dimensions.hidden + max(3 * dimensions.intermediate, attention)
    # Gradients, which the default search takes, keep what goes into each layer and comes out.
    row = widest + (dimensions.layers + 2) * dimensions.hidden
    return ExpectedMemory(
        weight_bytes=weights,
        kv_full_bytes=cache_bytes(len(dimensions.full_layers), mask, dimensions, tokens),
        kv_hybrid_bytes=cache_bytes(full_layers, mask, dimensions, tokens),
        context_tokens=tokens,
        measuring_bytes=weights + prompt_tokens * row * dimensions.kv_bytes_per_value,
        proving_bytes=parameters * proving_bytes,
        proving_dtype=proving,
    )
