"""How a layer attends while it is run: fully, in the window, not at all, or by a mixture of these.

transformers lets attention functions be registered by name, and a layer looks its function up by
the name in its configuration at every call. The one registered here calls the function that the
layer's caller hands down, so the layers themselves stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AttentionInterface

from converter.inference.positions import NO_ATTENTION
from converter.model.mask import FULL, SLIDING, full_kv_heads, is_mixed
from converter.plan.plan import model_kinds

# From a layer's attention module, its queries, keys, values and rows, as transformers calls it:
# (batch, rows, heads, head_dim) and None.
Attention = Callable[..., tuple[torch.Tensor, None]]

_NAME = "hybridize_given_1"
AttentionInterface.register(
    _NAME, lambda *arguments, given_attention, **options: given_attention(*arguments, **options)
)


@contextmanager
def calling_given_attention(config: Any) -> Iterator[None]:
    """Have layers that read this configuration call what they are given as `given_attention`."""
    before = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def kinds_of(config: Any) -> tuple[str, ...]:
    """What each layer is in the model itself, from its checkpoint's configuration."""
    return model_kinds(config.hybrid.get("layer_types") or config.layer_types)


def attention_of_type(attention: Attention, layer_type: str) -> Attention:
    """The checkpoint's attention as a layer of a type has it, whatever the layer's own type is."""
    if layer_type == NO_ATTENTION:
        return lambda _module, query, *_, **__: (torch.zeros_like(query.transpose(1, 2)), None)
    if is_mixed(layer_type):
        full, sliding = (attention_of_type(attention, kind) for kind in (FULL, SLIDING))
        return mixed_attention(full, sliding, layer_type)

    def attend(module: Any, *states: Any, **options: Any) -> tuple[torch.Tensor, None]:
        layer_types = (layer_type,) * (module.layer_idx + 1)
        config = SimpleNamespace(
            hybrid={**module.config.hybrid, "layer_types": layer_types},
            layer_types=layer_types,
            sliding_window=getattr(module.config, "sliding_window", None),
        )
        stand_in = SimpleNamespace(config=config, layer_idx=module.layer_idx)
        return attention(stand_in, *states, **options)

    return attend


def mixed_attention(full: Attention, sliding: Attention, layer_type: str) -> Attention:
    """Each KV head's queries, keys and values by the attention that a mixed type gives it."""

    def attend(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *rows: Any,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        kv_heads = key.shape[1]
        far = full_kv_heads(layer_type, kv_heads)
        near = [head for head in range(kv_heads) if head not in far]
        # The query heads of a KV head stand together.
        by_head = [states.chunk(kv_heads, dim=1) for states in (query, key, value)]
        parts: dict[int, torch.Tensor] = {}
        for heads, attention in ((far, full), (near, sliding)):
            states = (torch.cat([each[head] for head in heads], dim=1) for each in by_head)
            output = attention(module, *states, *rows, **options)[0]
            parts.update(zip(heads, output.chunk(len(heads), dim=2), strict=True))
        return torch.cat([parts[head] for head in range(kv_heads)], dim=2), None

    return attend


def gated_attention(full: Attention, sliding: Attention, gate: torch.Tensor) -> Attention:
    """`sliding + gate * (full - sliding)`, of which the derivative by `gate` is wanted.

    The gate is (1,) for the whole layer, or (kv_heads,) for the query heads of each KV head.
    Where all gates are 0 the full branch passes no gradient down, so it keeps no graph.
    """

    def attend(*arguments: Any, **options: Any) -> tuple[torch.Tensor, None]:
        near = sliding(*arguments, **options)[0]
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(gate.detach().any())):
            difference = full(*arguments, **options)[0] - near
        # Of a model that is spread over devices, the layer's may be another than its input's.
        weight = gate.to(difference.device)
        # The query heads of a KV head stand together.
        batch, rows, _, head_dim = difference.shape
        by_gate = difference.reshape(batch, rows, len(gate), -1, head_dim)
        return near + (weight[:, None, None] * by_gate).flatten(2, 3), None

    return attend
