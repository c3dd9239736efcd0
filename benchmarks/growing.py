"""A deep model from a trained one of few layers: new ones between, and training with gaps.

A model of more KV heads, too: each has the keys and values that its query heads shared before.

Inserted layers hardly write to the residual stream at first, so what the model does is preserved.
A trained layer's attention can be shared by two layers, each of which writes half of it, the second
with its MLP. Then layers stand in for each other from the start, as those of large models do, and
training with layers left out at random repairs what the sharing changed.

A Qwen3.5 is grown from a Qwen3 so: where it has a recurrent layer, that one takes the place of the
trained attention, and the trained MLP stays.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3ForCausalLM

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")


def place_of(layer: int, layers: int, trained: int) -> int:
    """Where a trained layer stands among so many: new ones come after it, as evenly as can be."""
    return layer * layers // trained


def grow(model: PreTrainedModel, folder: Path, twins: bool = False) -> None:
    """Give an untrained model, deeper or of more KV heads, the weights of the one in a folder.

    With twins, the layer behind a trained one shares its attention. Projections of other layers
    that write to the residual stream start at 0.02/sqrt(inputs).
    """
    trained = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers, few = model.config.num_hidden_layers, trained.config.num_hidden_layers
    moved = {}
    for name, weight in trained.state_dict().items():
        if not (match := _LAYER.fullmatch(name)):
            moved[name] = weight
            continue
        place, part = place_of(int(match[1]), layers, few), match[2]
        if twins:
            if part == "self_attn.o_proj.weight":
                weight = weight / 2
            moved[f"model.layers.{place + 1}.{part}"] = weight
        if not (twins and part == "mlp.down_proj.weight"):
            moved[f"model.layers.{place}.{part}"] = weight
    with torch.no_grad():
        for layer in model.model.layers:
            mixer = (
                layer.self_attn.o_proj
                if hasattr(layer, "self_attn")
                else layer.linear_attn.out_proj
            )
            for projection in (mixer, layer.mlp.down_proj):
                projection.weight.normal_(0.0, 0.02 * projection.in_features**-0.5)
        own = model.state_dict()
        gated = model.config.model_type == "qwen3_5_text"
        for name, weight in moved.items():
            if name not in own:
                continue
            if gated:
                weight = _gated(name, weight, trained.config.head_dim)
            if name.endswith(("k_proj.weight", "v_proj.weight")):
                heads = weight.unflatten(0, (-1, model.config.head_dim))
                times = len(own[name]) // len(weight)
                weight = heads.repeat_interleave(times, dim=0).flatten(0, 1)
            own[name].copy_(weight)


def _gated(name: str, weight: Tensor, head_dim: int) -> Tensor:
    """A Qwen3's weight as a Qwen3.5 has it: its norms add one, its attention has output gates.

    Rows of gates, which follow each head's query rows, are zero: gates half open. So outputs weigh
    twice as much.
    """
    if name.endswith("norm.weight"):
        return weight - 1
    if name.endswith("q_proj.weight"):
        queries = weight.view(-1, head_dim, weight.shape[1])
        return torch.cat([queries, torch.zeros_like(queries)], dim=1).flatten(0, 1)
    return 2 * weight if name.endswith("o_proj.weight") else weight


def leave_out(model: PreTrainedModel, share: float) -> None:
    """From now on every layer is left out of so large a share of training steps."""

    def instead(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return inputs[0] if layer.training and torch.rand(()) < share else output

    for layer in model.model.layers:
        layer.register_forward_hook(instead)
