"""What families with experts share: their tensors, and how transformers stores them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from converter.model.dimensions import ModelDimensions
from converter.model.families.stock_gguf import Config, Shapes, expert_count

# More than any model has; a list of tensors is made for each.
_MOST_EXPERTS = 4096
_NAMES = ("gate_proj", "up_proj", "down_proj")
# How transformers is to run experts in float64: torch's grouped matrix product stops at float32.
EXACTLY = {"experts_implementation": "eager"}


def working_experts(config: Config) -> Any:
    """How many experts work on a token, as the config says it; 1 where it does not."""
    return config.get("num_experts_per_tok") or config.get("top_k_experts") or 1


def unknown_experts(config: Config, width: str = "moe_intermediate_size") -> str | None:
    """Why a mixture is refused that does not say its experts' number and width, or None.

    So is one of whose layers some have no experts.
    """
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        return "some of its layers have no experts, which hybridize does not know yet"
    count, wide, working = expert_count(config), config.get(width), working_experts(config)
    if not 0 < count <= _MOST_EXPERTS or type(wide) is not int or wide < 1:
        return f"it does not say how many experts it has (num_experts, {width})"
    if type(working) is not int or not 0 < working <= count:
        return f"it says that {working!r} of its experts work on a token"
    return None


def mlp_tensors(prefix: str, hidden: int, width: int, names: Sequence[str] = _NAMES) -> Shapes:
    """The matrices of one expert, named in the order of gate, up and down."""
    gate, up, down = (f"{prefix}.{name}.weight" for name in names)
    return {gate: (width, hidden), up: (width, hidden), down: (hidden, width)}


def expert_tensors(
    config: Config,
    shape: ModelDimensions,
    width: int,
    prefix: str = "mlp",
    names: Sequence[str] = _NAMES,
) -> Shapes:
    """The router of one layer and every expert's matrices."""
    tensors: Shapes = {f"{prefix}.gate.weight": (expert_count(config), shape.hidden)}
    for expert in range(expert_count(config)):
        tensors |= mlp_tensors(f"{prefix}.experts.{expert}", shape.hidden, width, names)
    return tensors


def pack_experts(tensors: dict[str, Any]) -> dict[str, Any]:
    """Stack the experts, gate over up, as transformers does when it loads a whole model."""
    import torch

    prefix, weights = "mlp.experts.", dict(tensors)
    count = sum(name.startswith(prefix) and ".down_proj." in name for name in tensors)
    if not count:
        return weights

    def take(kind: str) -> list[Any]:
        return [weights.pop(f"{prefix}{expert}.{kind}.weight") for expert in range(count)]

    gate, up = torch.stack(take("gate_proj")), torch.stack(take("up_proj"))
    weights[f"{prefix}gate_up_proj"] = torch.cat([gate, up], dim=1)
    weights[f"{prefix}down_proj"] = torch.stack(take("down_proj"))
    return weights


def packed_shapes(tensors: Shapes) -> Shapes:
    """Shapes of a layer's tensors after `pack_experts`, from those before."""
    prefix = "mlp.experts."
    shapes = {name: size for name, size in tensors.items() if not name.startswith(prefix)}
    down = [size for name, size in tensors.items() if name.startswith(prefix) and ".down" in name]
    if not down:
        return shapes
    hidden, width = down[0]
    return shapes | {
        f"{prefix}gate_up_proj": (len(down), 2 * width, hidden),
        f"{prefix}down_proj": (len(down), hidden, width),
    }
