"""What a measurement is expected to take: a formula over sizes, not a promise.

The figures in the recipes and in `inspect` come from here: operations and bytes counted from the
sizes of a model, and an assumption of how fast a machine is. A recipe says whether anybody
measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converter.calibration.selectors import SELECTORS, methods_of, periodic_layers, periodic_offsets
from converter.common.units import human_bytes
from converter.decide import choose_length, choose_mask, chosen_budget
from converter.inference.positions import TokenSpans, layer_forwards
from converter.model.dimensions import ModelDimensions
from converter.model.families import Family
from converter.model.mask import Mask
from converter.plan.plan import cache_bytes, layer_types_of
from converter.settings import Settings


@dataclass(frozen=True)
class Machine:
    """A class of machine.

    Attributes:
        name: what people call it.
        memory_bytes: of its accelerator.
        peak_flops: bfloat16 multiplications and additions a second, without sparsity.
        utilisation: the share of the peak that long prompts are assumed to reach.
    """

    name: str
    memory_bytes: int
    peak_flops: float
    utilisation: float


H100 = Machine("one H100 (80 GB)", 80_000_000_000, 989e12, 0.4)


@dataclass(frozen=True)
class Cost:
    """What converting a model by some settings is expected to take.

    Attributes:
        weight_bytes: of the model as it is stored.
        kv_full_bytes, kv_hybrid_bytes: cache of one sequence of `context_tokens`.
        context_tokens: the model's longest sequence.
        measuring_bytes: accelerator memory while layers are scored.
        measuring_seconds: scoring and comparing held-out quality, on `machine`.
        proving_bytes: main memory of the verification, which holds one copy of the model.
        proving_dtype: what that copy is in.
        machine: the class of machine.
    """

    weight_bytes: int
    kv_full_bytes: int
    kv_hybrid_bytes: int
    context_tokens: int
    measuring_bytes: int
    measuring_seconds: float
    proving_bytes: int
    proving_dtype: str
    machine: Machine

    def sentences(self) -> tuple[str, ...]:
        """The figures as a recipe states them."""
        machine = self.machine
        speed = f"{machine.utilisation:.0%} of {machine.peak_flops / 1e12:.0f} TFLOP/s"
        return (
            f"weights {human_bytes(self.weight_bytes)}; "
            f"KV cache of {self.context_tokens:,} tokens {human_bytes(self.kv_hybrid_bytes)} "
            f"instead of {human_bytes(self.kv_full_bytes)}",
            f"measuring about {human_bytes(self.measuring_bytes)} and "
            f"{human_seconds(self.measuring_seconds)} on {machine.name}, if it reaches {speed}",
            f"proving {human_bytes(self.proving_bytes)} of main memory ({self.proving_dtype})",
        )


def human_seconds(seconds: float) -> str:
    """A duration in minutes or hours."""
    minutes = max(1, round(seconds / 60))
    if minutes < 90:
        return f"{minutes} minute{'' if minutes == 1 else 's'}"
    return f"{seconds / 3600:.1f} hours"


def expected_cost(
    config: Mapping[str, Any],
    family: Family,
    shape: ModelDimensions,
    settings: Settings,
    machine: Machine = H100,
) -> Cost:
    """What calibrating and proving a model is expected to take.

    Args:
        config: the model's config.json.
        family: its architecture.
        shape: its sizes.
        settings: of the conversion; the mask, the budget, the length and the numbers of examples
            matter.
        machine: where.

    Raises:
        PlanError: the settings do not fit the model.
    """
    mask, length = choose_mask(settings, shape), choose_length(settings, shape)
    kept = chosen_budget(settings).layers(shape, mask)
    tensors = family.expected_tensors(config, shape)
    parameters = sum(math.prod(size) for size in tensors.values())
    return Cost(
        weight_bytes=parameters * shape.kv_bytes_per_value,
        kv_full_bytes=cache_bytes(shape.layers, mask, shape, shape.context_tokens),
        kv_hybrid_bytes=cache_bytes(kept, mask, shape, shape.context_tokens),
        context_tokens=shape.context_tokens,
        measuring_bytes=parameters * shape.kv_bytes_per_value + _activation_bytes(shape, length),
        measuring_seconds=_flops(config, family, shape, settings, mask, length, kept)
        / (machine.peak_flops * machine.utilisation),
        proving_bytes=parameters * _PROVING[exact := _proves_exactly(parameters)],
        proving_dtype=exact,
        machine=machine,
    )


_PROVING = {"float64": 8, "float32": 4}


def _proves_exactly(parameters: int) -> str:
    """As `verify` chooses: float64 for what then takes at most 4 GiB."""
    return "float64" if parameters * 8 <= 4 << 30 else "float32"


def _activation_bytes(shape: ModelDimensions, length: int) -> int:
    """The widest moment of a layer: the MLP's three products, or queries, keys and values."""
    attention = 2 * shape.heads * shape.head_dim + 2 * shape.kv_heads * shape.head_dim
    return (
        length
        * (4 * shape.hidden + max(3 * shape.intermediate, attention))
        * shape.kv_bytes_per_value
    )


def _flops(
    config: Mapping[str, Any],
    family: Family,
    shape: ModelDimensions,
    settings: Settings,
    mask: Mask,
    length: int,
    kept: int,
) -> float:
    """Operations when every layer is scored on every example, as a race does at most.

    Layers run as `converter.inference` runs them; the output matrix works on answers only and is
    left out.
    """
    layers = shape.layers
    reach = min(mask.window_tokens + mask.sink_tokens, length)
    spans = TokenSpans(min(reach, length - 1), length - 1, length, length)
    methods = [name for name in methods_of(settings.method) if name in SELECTORS]
    by_method = {name: SELECTORS[name].cost(spans, mask, layers, kept) for name in methods}
    scored = math.fsum(by_method.values())
    periodic = [periodic_layers(layers, kept, i) for i in range(periodic_offsets(layers, kept))]
    plans = [layer_types_of(full, layers) for full in (range(layers), (), range(kept), *periodic)]
    compared = layer_forwards(plans, spans, mask)
    # Layers that attend fully: the switched ones, or those of the original and of the plans.
    scored_full = math.fsum(
        cost * (1 if name in _ATTEND_FULLY else kept / layers) if name not in _RESTORE else layers
        for name, cost in by_method.items()
    )
    compared_full = layers + kept * (len(plans) - 2)
    # Several methods are compared on the validation examples as the plan is on the held-out ones.
    comparing = settings.holdout + (settings.validation if len(methods) > 1 else 0)
    forwards = settings.samples * scored + comparing * compared
    full = min(forwards, settings.samples * scored_full + comparing * compared_full)
    dense = 2 * family.weights_per_token(config, shape) * length
    # Scores and weighted values, each 2 operations for every query, key and width.
    pair = 4 * shape.heads * shape.head_dim
    attention = full * pair * length * length / 2 + (forwards - full) * pair * length * reach
    return forwards * dense + attention


# Methods whose layers attend fully all the way, and those that let one layer at a time. Searches
# let as many as are kept.
_ATTEND_FULLY = {"nll-remove", "path-integral"}
_RESTORE = {"nll-restore", "kl", "kl-all", "first-order"}
