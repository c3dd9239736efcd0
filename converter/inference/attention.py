"""The attention that a layer runs with: the checkpoint's own, none, mixed by a gate, or weighed.

transformers lets attention functions be registered by name, and a layer looks its function up by
the name in its configuration at every call. So the layers themselves stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AttentionInterface

from converter.inference.positions import NO_ATTENTION
from converter.model.mask import FULL, SLIDING

_ABSENT_NAME = "hybridize_absent_1"
_WEIGHED_NAME = "hybridize_weighed_1"
_GATED_NAME = "hybridize_gated_1"


@dataclass(frozen=True)
class Gate:
    """How much of a layer's full attention is let through.

    Attributes:
        weight: (1,) for the whole layer, or (kv_heads,) for the query heads of each KV head; 0 is
            sliding attention, 1 full attention.
        attention: the checkpoint's attention function, which computes either kind.
    """

    weight: torch.Tensor
    attention: Callable[..., tuple[torch.Tensor, None]]


def absent_attention(
    module: Any, query: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    """Attention that adds nothing: (batch, rows, heads, head_dim) of zeros."""
    del module
    return torch.zeros_like(query.transpose(1, 2)), None


def gated_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    gate: Gate,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """`sliding + weight * (full - sliding)`, of which the derivative by `weight` is wanted.

    Where all weights are 0 the full branch passes no gradient down, so it keeps no graph.
    """

    def attend(kind: str, *states: torch.Tensor) -> torch.Tensor:
        stand_in = SimpleNamespace(
            config=SimpleNamespace(
                hybrid=module.config.hybrid, layer_types=[kind] * (module.layer_idx + 1)
            ),
            layer_idx=module.layer_idx,
        )
        return gate.attention(stand_in, *states, attention_mask, **options)[0]

    sliding = attend(SLIDING, query, key, value)
    if not gate.weight.detach().any():
        with torch.no_grad():
            difference = attend(FULL, query, key, value) - sliding
    else:
        difference = attend(FULL, query, key, value) - sliding
    # The query heads of a KV head stand together.
    batch, rows, _, head_dim = difference.shape
    by_gate = difference.reshape(batch, rows, len(gate.weight), -1, head_dim)
    return sliding + (gate.weight[:, None, None] * by_gate).flatten(2, 3), None


@dataclass(frozen=True)
class Weighing:
    """Which share of a layer's full attention is asked for.

    Attributes:
        rows: of so many rows, the last ones.
        sinks: the first so many keys count,
        recent: and the last so many that a row sees, its own included.
        attention: the checkpoint's attention function, which computes the layer.
        tell: is given the share.
    """

    rows: int
    sinks: int
    recent: int
    attention: Callable[..., tuple[torch.Tensor, None]]
    tell: Callable[[float], None]


def weighed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    weighing: Weighing,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The checkpoint's attention, which also tells the share; all keys must be there."""
    weighing.tell(attention_share(query, key, scaling, weighing))
    return weighing.attention(module, query, key, value, attention_mask, scaling=scaling, **options)


def attention_share(
    query: torch.Tensor, key: torch.Tensor, scaling: float | None, weighing: Weighing
) -> float:
    """The share of causal attention on the first and the last keys, averaged over rows and heads.

    Args:
        query: (1, heads, rows, head_dim), of which the last row is the last key's.
        key: (1, kv_heads, keys, head_dim).
        scaling: factor on the scores; 1 / sqrt(head_dim) when None.
        weighing: which rows and keys.

    Returns:
        0 to 1. A key that is both first and last counts once.
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    last = key.shape[2]
    p = torch.arange(last, device=key.device)
    q = torch.arange(last - weighing.rows, last, device=key.device)[:, None]
    hidden = p > q
    uncounted = hidden | ((p >= weighing.sinks) & (p <= q - weighing.recent))
    by_kv_head = query[0, :, -weighing.rows :].to(exact).chunk(key.shape[1])
    shares = []
    # A head at a time, so that little more than (rows, keys) is ever written down.
    for queries, keys in zip(by_kv_head, key[0], strict=True):
        scores = queries @ keys.to(exact).T * scale
        whole, counted = (
            scores.masked_fill(left_out, -torch.inf).logsumexp(dim=-1)
            for left_out in (hidden, uncounted)
        )
        shares.append((counted - whole).exp())
    return float(torch.stack(shares).mean())


AttentionInterface.register(_ABSENT_NAME, absent_attention)
AttentionInterface.register(_WEIGHED_NAME, weighed_attention)
AttentionInterface.register(_GATED_NAME, gated_attention)


@contextmanager
def attending(config: Any, kind: str) -> Iterator[None]:
    """Have every layer that reads this configuration attend by one kind for a while.

    The kind stays in the configuration afterwards: whoever walks the layers says it every time, and
    setting it costs a validation of the whole list.
    """
    if kind == NO_ATTENTION:
        with _named(config, _ABSENT_NAME):
            yield
        return
    if config.layer_types[0] != kind:
        config.layer_types = [kind] * len(config.layer_types)
    yield


@contextmanager
def weighing_attention(config: Any) -> Iterator[None]:
    """Have every layer that reads this configuration attend fully; pass it a `weighing`."""
    with attending(config, FULL), _named(config, _WEIGHED_NAME):
        yield


@contextmanager
def gating(config: Any) -> Iterator[None]:
    """Have every layer that reads this configuration attend by both kinds; pass it a `gate`."""
    with _named(config, _GATED_NAME):
        yield


@contextmanager
def _named(config: Any, name: str) -> Iterator[None]:
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
