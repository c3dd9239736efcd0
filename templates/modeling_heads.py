# Copyright the hybridize authors. Licensed under the Apache License, Version 2.0.
"""Hybrid attention that differs between the KV heads of one layer.

Written by `hybridize` beside modeling_hybrid.py, or modeling_masks.py, on which it builds, into
checkpoints with such layers. Of a layer whose kind in `config.hybrid["layer_types"]` is
`mixed_attention:0,2`, KV heads 0 and 2 attend fully, with the query heads that share them; the
others are those of a sliding layer.

How it works: queries, keys and values are parted by KV head, each part goes the way of a full or a
sliding layer, and the heads are put together again in their order. So does the cache: it holds
everything for some heads, and for the others what a sliding layer holds.
"""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicLayer

from .modeling_hybrid import NAME as LAYERS_NAME
from .modeling_hybrid import OTHERS, Rows, layer_kinds
from .modeling_hybrid import HybridForCausalLM as LayersForCausalLM
from .modeling_hybrid import hybrid_attention as attention_of_layers

_OWN = sha256(LAYERS_NAME.encode() + Path(__file__).read_bytes()).hexdigest()
NAME = f"hybrid_attention_{_OWN[:16]}"

MIXED = "mixed_attention:"
# Keys and values of the KV heads that attend fully, and of the others.
Parted = tuple[torch.Tensor, torch.Tensor]


class UniformLayer:
    """What the files below ask of a layer's attention module and its configuration."""

    layer_idx = 0

    def __init__(self, mask: dict[str, Any], kind: str) -> None:
        self.hybrid = {"mask": mask, "layer_types": [kind]}
        self.config = self


def full_heads(kind: str, kv_heads: int) -> tuple[int, ...]:
    """The KV heads that attend fully in a layer of a mixed kind: some, but not all.

    Raises:
        ValueError: the kind does not name such heads of a layer that has so many.
    """
    word, _, names = kind.partition(":")
    known = [str(head) for head in range(kv_heads)]
    named = names.split(",")
    heads = tuple(head for head, name in enumerate(known) if name in named)
    if f"{word}:" != MIXED or [known[h] for h in heads] != named or len(heads) == kv_heads:
        raise ValueError(f"{kind!r} is no kind of a layer of {kv_heads} KV heads")
    return heads


def part(states: torch.Tensor, heads: Sequence[int], kv_heads: int) -> Parted:
    """Split (batch, kv_heads or heads, rows, head_dim): what belongs to these KV heads, the rest.

    The query heads of a KV head stand together.
    """
    every = states.chunk(kv_heads, dim=1)
    rest = [head for head in range(kv_heads) if head not in heads]
    return torch.cat([every[h] for h in heads], dim=1), torch.cat([every[h] for h in rest], dim=1)


def hybrid_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | Parted,
    value: torch.Tensor | Parted,
    attention_mask: Rows,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, of whichever kind the configuration gives it.

    Args:
        module: the layer's attention module, for its `layer_idx` and `config`.
        query: (batch, heads, rows, head_dim).
        key, value: (batch, kv_heads, keys, head_dim), as the files below take them; or parted, as
            `MixedLayer` has them.
        attention_mask, options: as the files below take them.

    Returns:
        (batch, rows, heads, head_dim) and None, as transformers expects.
    """
    kind = layer_kinds(module.config)[module.layer_idx]
    if not kind.startswith(MIXED):
        return attention_of_layers(module, query, key, value, attention_mask, **options)
    if isinstance(key, torch.Tensor):
        kv_heads = key.shape[1]
        heads = full_heads(kind, kv_heads)
        key, value = part(key, heads, kv_heads), part(value, heads, kv_heads)
    else:
        kv_heads = key[0].shape[1] + key[1].shape[1]
        heads = full_heads(kind, kv_heads)
    mask = module.config.hybrid["mask"]
    outputs = [
        attention_of_layers(UniformLayer(mask, way), *states, attention_mask, **options)[0]
        for way, *states in zip(
            ("full_attention", "sliding_attention"),
            part(query, heads, kv_heads),
            key,
            value,
            strict=True,
        )
    ]
    # Each KV head's query heads, taken from where they are now.
    full, sliding = (iter(output.split(query.shape[1] // kv_heads, dim=2)) for output in outputs)
    each = [next(full if head in heads else sliding) for head in range(kv_heads)]
    return torch.cat(each, dim=2), None


class MixedLayer(DynamicLayer):
    """Two cache layers: one for the KV heads that attend fully, one for the others.

    `update` returns the keys of the two, and their values; `hybrid_attention` takes them so.
    """

    def __init__(self, full: DynamicLayer, sliding: DynamicLayer, kind: str) -> None:
        super().__init__()
        self.full, self.sliding, self.kind = full, sliding, kind

    @property
    def parts(self) -> tuple[DynamicLayer, DynamicLayer]:
        """Both; first the one that may refuse what is asked."""
        return self.sliding, self.full

    @property
    def record_past(self) -> bool:
        """Whether states are held until `crop` tells which are wanted."""
        return getattr(self.sliding, "record_past", False)

    def activate_past_recording(self) -> None:
        """Hold states until `crop` tells which are wanted."""
        if hasattr(self.sliding, "activate_past_recording"):
            self.sliding.activate_past_recording()

    def set_starts(self, starts: torch.Tensor, latest: int) -> None:
        """Say where the sequences start, where sinks are kept."""
        if hasattr(self.sliding, "set_starts"):
            self.sliding.set_starts(starts, latest)

    def update(  # type: ignore[override]
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Parted, Parted]:
        """Add (batch, kv_heads, new, head_dim) states; all that the new rows may look at."""
        kv_heads = key_states.shape[1]
        heads = full_heads(self.kind, kv_heads)
        states = zip(*(part(s, heads, kv_heads) for s in (key_states, value_states)), strict=True)
        (key, value), (near_key, near_value) = (
            layer.update(*added, *args, **kwargs)
            for layer, added in zip((self.full, self.sliding), states, strict=True)
        )
        self.is_initialized = True
        return (key, near_key), (value, near_value)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As a layer that attends fully."""
        sizes: tuple[int, int] = self.full.get_mask_sizes(query_length)
        return sizes

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return int(self.full.get_seq_length())

    def reset(self) -> None:
        """Forget everything."""
        for layer in self.parts:
            layer.reset()
        self.is_initialized = False

    def offload(self) -> None:
        """Move what is held to main memory."""
        for layer in self.parts:
            layer.offload()

    def prefetch(self) -> None:
        """Bring it back."""
        for layer in self.parts:
            layer.prefetch()

    def crop(self, *args: Any) -> None:
        """Forget the newest tokens."""
        for layer in self.parts:
            layer.crop(*args)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Follow beam search."""
        for layer in self.parts:
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        for layer in self.parts:
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some sequences."""
        for layer in self.parts:
            layer.batch_select_indices(indices)


AttentionInterface.register(NAME, hybrid_attention)
AttentionMaskInterface.register(NAME, AttentionMaskInterface()[LAYERS_NAME])


class HybridForCausalLM(LayersForCausalLM):
    """The model of the files below with the attention above, and a cache that fits it.

    `set_full_attention_layers` takes the indices of layers all of whose KV heads attend fully, or
    a count of KV heads: so many of the ranking.
    """

    attention = NAME

    def cache_layer(self, kind: str) -> DynamicLayer:
        """A cache layer for a decoder layer of one of the plan's kinds."""
        if not kind.startswith(MIXED):
            return super().cache_layer(kind)
        full, sliding = (self.cache_layer(f"{each}_attention") for each in ("full", "sliding"))
        return MixedLayer(full, sliding, kind)

    def layout(self, layer: DynamicLayer) -> Any:
        """What a cache layer has in common with all that hold the same."""
        return type(layer), getattr(layer, "kind", None)

    def set_full_attention_layers(self, layers: int | list[int]) -> None:
        """Change which layers attend fully, between requests: indices, or a count of KV heads."""
        if not isinstance(layers, int):
            super().set_full_attention_layers(layers)
            return
        kinds, units = layer_kinds(self.config), self.most_useful(layers)
        # Every KV head is ranked, of the layers that plans are about; as layer * kv_heads + head.
        planned = sum(kind not in OTHERS for kind in kinds)
        kv_heads = len(self.config.hybrid["ranking"]) // planned
        kept: dict[int, list[int]] = {}
        for unit in units:
            kept.setdefault(unit // kv_heads, []).append(unit % kv_heads)
        self.set_layer_kinds(
            kind if kind in OTHERS else _kind_of(sorted(kept.get(layer, [])), kv_heads)
            for layer, kind in enumerate(kinds)
        )


def _kind_of(heads: list[int], kv_heads: int) -> str:
    """The kind of a layer of which these KV heads attend fully."""
    if len(heads) == kv_heads:
        return "full_attention"
    return f"{MIXED}{','.join(map(str, heads))}" if heads else "sliding_attention"
