# Copyright the hybridize authors. Licensed under the Apache License, Version 2.0.
"""Hybrid attention whose sliding layers see more than a window.

Written by `hybridize` beside modeling_hybrid.py, which it builds on, into checkpoints whose mask,
`config.hybrid["mask"]`, needs it. In a sliding layer the token at position q attends to position
p <= q when

    p > q - window_tokens: the window, the token itself included,
    or p < sink_tokens: the first tokens, kept for ever,
    or full_attention_decode and q is generated: only the prompt slides.

Positions count real tokens: left padding is skipped, packed sequences each start at 0.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .attention_hybrid import (
    BLOCK_ROWS,
    Options,
    Rows,
    attend,
    attend_by_rows,
    attend_flash,
    blocks_of,
    blocks_that_fit,
    edges,
    flash,
    rows_of_blocks,
    takes_flash,
    visible,
)
from .modeling_hybrid import NAME as PLAIN_NAME
from .modeling_hybrid import HybridForCausalLM as PlainForCausalLM
from .modeling_hybrid import (
    checked,
    describe_rows,
    layer_kinds,
    left_padding,
    takes_what_the_base_takes,
    window_of,
)

_OWN = sha256(PLAIN_NAME.encode() + Path(__file__).read_bytes()).hexdigest()
NAME = f"hybrid_attention_{_OWN[:16]}"


def hybrid_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Rows,
    scaling: float | None = None,
    dropout: float = 0.0,
    prompt_length: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, of whichever kind `config.layer_types` gives it.

    Args:
        module: the layer's attention module, for its `layer_idx` and `config`.
        query: (batch, heads, rows, head_dim).
        key, value: (batch, kv_heads, keys, head_dim); the last `rows` keys are the rows' own, the
            earlier ones come from the cache, in order: all, or those of `SinkWindowLayer`.
        attention_mask: what `describe_rows` said of the rows.
        scaling: factor on the scores; 1 / sqrt(head_dim) when None.
        dropout: probability of dropping an attention weight, in training.
        prompt_length: tokens of the prompt, padding included; rows from there on are generated.

    Returns:
        (batch, rows, heads, head_dim) and None, as transformers expects.
    """
    rows = checked(attention_mask)
    options, mask = Options(scaling, dropout), module.config.hybrid["mask"]
    window, count = window_of(module), query.shape[2]
    if layer_kinds(module.config)[module.layer_idx] == "own_sliding_attention":
        return attend(query, key, value, rows, window, options).contiguous(), None
    slides = 0 if window is None else prompt_rows(mask, rows, count, prompt_length)
    has_all = rows.start is None and key.shape[2] == rows.first + count
    if has_all and rows.first + slides <= (window or 0) + mask["sink_tokens"]:
        # Nothing is hidden: the very calls of a full layer, so that both agree to the last bit.
        slides = 0
    parts = []
    if slides:
        near = (s[:, :, : s.shape[2] - (count - slides)] for s in (key, value))
        parts.append(slide(query[:, :, :slides], *near, rows, window, mask, options))
    if slides < count:
        generated = replace(rows, first=rows.first + slides)
        parts.append(attend(query[:, :, slides:], key, value, generated, None, options))
    return torch.cat(parts, dim=1).contiguous(), None


def prompt_rows(mask: dict[str, Any], rows: Rows, count: int, prompt_length: int | None) -> int:
    """How many of a sliding layer's rows slide, as those of the prompt do."""
    if not mask["full_attention_decode"]:
        return count
    if rows.packed:
        raise ValueError("packed sequences have no generated rows: pass one sequence per row")
    if prompt_length is None:
        prompt_length = rows.first if rows.first > 0 and count == 1 else rows.first + count
    return min(max(prompt_length - rows.first, 0), count)


@dataclass(frozen=True)
class Keys:
    """Keys and values of one sliding layer.

    Attributes:
        key, value: (batch, kv_heads, keys, head_dim) of consecutive positions up to the newest.
        first: position of the first of them.
        sink_key, sink_value: (batch, kv_heads, sinks, head_dim) of each sequence's first tokens,
            for rows whose window does not reach back to them.
        sink_position: (batch or 1, sinks), where those stand.
    """

    key: torch.Tensor
    value: torch.Tensor
    first: int
    sink_key: torch.Tensor
    sink_value: torch.Tensor
    sink_position: torch.Tensor


def keys_of(
    key: torch.Tensor, value: torch.Tensor, rows: Rows, count: int, mask: dict[str, Any]
) -> Keys:
    """Find the sinks: `SinkWindowLayer` puts them before the window, else they stand in place."""
    last, sinks = rows.first + count, mask["sink_tokens"]
    position = torch.arange(sinks, device=key.device)[None]
    if rows.start is not None:
        # The last token is the real sequence's; the padding before that is a sequence, too.
        position = position + rows.start[:, -1:]
    if key.shape[2] > count and not mask["full_attention_decode"]:
        early_key, key = key.tensor_split([sinks], dim=2)
        early_value, value = value.tensor_split([sinks], dim=2)
        return Keys(key, value, last - key.shape[2], early_key, early_value, position)
    index = position.clamp(max=last - 1)[:, None, :, None].expand(*key.shape[:2], -1, key.shape[3])
    return Keys(key, value, 0, key.gather(2, index), value.gather(2, index), position)


def slide(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: Rows,
    window: int,
    mask: dict[str, Any],
    options: Options,
) -> torch.Tensor:
    """Attention through a window and to the sinks.

    Takes what `hybrid_attention` takes.

    Returns:
        (batch, rows, heads, head_dim).
    """
    sinks, count = mask["sink_tokens"], query.shape[2]
    if not sinks:
        return attend(query, key, value, rows, window, options)
    keys, last = keys_of(key, value, rows, count, mask), rows.first + count
    if rows.start is None and keys.first == 0 and last <= window + sinks:
        # No row's window has passed more than sinks.
        return attend(query, keys.key, keys.value, rows, None, options)
    if rows.start is None and count == 1 and keys.first >= sinks and last - keys.first <= window:
        return attend_by_rows(query, key, value, None, options)
    # The gradient of log-sum-exps is lost, so what trains goes in blocks.
    trains = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    simple = not trains and not rows.packed and rows.real is None and count > 1
    if simple and takes_flash(query, options):
        return slide_flash(query, keys, rows, window, options.scale)
    if rows.start is None:
        return slide_blocks(query, keys, rows, window, options)
    return slide_masked(query, keys, rows, window, options)


def slide_flash(
    query: torch.Tensor, keys: Keys, rows: Rows, window: int, scale: float | None
) -> torch.Tensor:
    """`slide` in two calls: through the window, and to the sinks that it has passed."""
    near, near_lse = attend_flash(query, keys.key, keys.value, rows, window, scale)
    (batch, _, count, _), sinks = query.shape, keys.sink_key.shape[2]
    # The window of the row at start + window + i is the first to have passed sink i. So each of
    # these rows is a sequence of its own, with copies of the sinks it sees; all later rows are one.
    passed = torch.arange(sinks + 1, device=query.device)
    index = torch.cat([passed[:i] for i in range(sinks + 1)])
    start = keys.sink_position[:, :1].expand(batch, 1) - rows.first
    place = pad(start + window + passed[:sinks], (1, 0)).flatten()
    row = torch.arange(batch, device=query.device).repeat_interleave(sinks + 1)
    of_keys = pad(passed.repeat(batch).cumsum(0), (1, 0)).int()
    far, far_lse = flash(
        query,
        keys.sink_key[:, :, index],
        keys.sink_value[:, :, index],
        edges(row, place, count, batch),
        of_keys,
        (-1, -1),
        scale,
    )
    sees_sinks = torch.arange(count, device=query.device) >= start + window
    share = torch.where(sees_sinks[..., None], torch.sigmoid(near_lse - far_lse), 1.0)[..., None]
    return (near.to(share.dtype) * share + far.to(share.dtype) * (1 - share)).to(query.dtype)


def slide_blocks(
    query: torch.Tensor, keys: Keys, rows: Rows, window: int, options: Options
) -> torch.Tensor:
    """`slide` without padding: the rows whose windows have passed all sinks as a batch of blocks.

    A block's keys are copied behind the sinks, as many blocks a call as fit in COPIED_BYTES.
    """
    first, last = rows.first, rows.first + query.shape[2]
    sinks = keys.sink_key.shape[2]
    ready = max(first, keys.first + window - 1, window + sinks - 1)
    inner = last - max(0, (last - ready) // BLOCK_ROWS) * BLOCK_ROWS
    # Up to here rows see every key before them.
    growing = min(max(first, window + sinks), inner) if keys.first == 0 else first
    parts = []
    if first < growing:
        near = (s[:, :, :growing] for s in (keys.key, keys.value))
        parts.append(attend(query[:, :, : growing - first], *near, rows, None, options))
    if growing < inner:
        between = query[:, :, growing - first : inner - first]
        parts.append(slide_masked(between, keys, Rows(growing), window, options))
    if inner < last:
        low = inner - window + 1 - keys.first
        near = (s[:, :, low:] for s in (keys.key, keys.value))
        (rows_, key, value), seen = blocks_of(query[:, :, inner - first :], *near, window)
        seen = pad(seen, (sinks, 0), value=True)
        for part in zip(*(s.split(blocks_that_fit(key)) for s in (rows_, key, value)), strict=True):
            near = (
                torch.cat([s.flatten(0, 1).expand(len(part[0]), -1, -1, -1), view], dim=2)
                for s, view in zip((keys.sink_key, keys.sink_value), part[1:], strict=True)
            )
            output = scaled_dot_product_attention(
                part[0], *near, attn_mask=seen, **options._asdict()
            )
            parts.append(rows_of_blocks(output, keys.key))
    return torch.cat(parts, dim=1)


def slide_masked(
    query: torch.Tensor, keys: Keys, rows: Rows, window: int, options: Options
) -> torch.Tensor:
    """`slide` for any rows, a call for each of their blocks, with its mask written down."""
    last, sinks = rows.first + query.shape[2], keys.sink_key.shape[2]
    parts = []
    for begin in range(rows.first, last, BLOCK_ROWS):
        end = min(begin + BLOCK_ROWS, last)
        # In packed sequences every one has its sinks, where they stand.
        low = 0 if rows.packed else max(begin - window + 1, keys.first)
        p = torch.arange(low, end, device=query.device)
        q = torch.arange(begin, end, device=query.device)[:, None]
        seen = visible(p, q, rows, None)
        start = 0 if rows.start is None else rows.start[:, None, None, p]
        seen = seen & ((p > q - window) | (p - start < sinks))
        near = [s[:, :, low - keys.first : end - keys.first] for s in (keys.key, keys.value)]
        if low > 0:
            # A sink from `low` on is among the window's keys already.
            passed = (keys.sink_position < low)[:, None, None].expand(-1, 1, end - begin, -1)
            batch = max(passed.shape[0], seen.shape[0])
            seen = torch.cat([m.expand(batch, -1, -1, -1) for m in (passed, seen)], dim=3)
            early = (keys.sink_key, keys.sink_value)
            near = [torch.cat(both, dim=2) for both in zip(early, near, strict=True)]
        part = query[:, :, begin - rows.first : end - rows.first]
        parts.append(attend_by_rows(part, *near, seen, options))
    return torch.cat(parts, dim=1)


class SinkWindowLayer(DynamicSlidingWindowLayer):
    """A cache layer that holds each sequence's first tokens and the window, and nothing else.

    `update` returns the sinks followed by the window and the new tokens. A sink that has not come
    yet has an empty place; `hybrid_attention` looks at a sink only once the window has passed it.

    Args:
        sliding_window: window_tokens; the current token is one of them, so one less is kept.
        sinks: sink_tokens.
    """

    def __init__(self, sliding_window: int, sinks: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self.sinks = sinks
        self.starts: torch.Tensor | None = None  # (batch,) left padding; None when there is none
        self.latest_start = 0
        self.sink_keys: torch.Tensor | None = None
        self.sink_values: torch.Tensor | None = None

    def set_starts(self, starts: torch.Tensor, latest: int) -> None:
        """Say where the sequences start, and the last of them; before the tokens there come."""
        self.starts, self.latest_start = starts, latest

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add (batch, kv_heads, new, head_dim) states; all that the new rows may look at."""
        first = self.cumulative_length
        if first < self.latest_start + self.sinks:
            self._keep_sinks(key_states, value_states, first)
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if self.sliding_window == 1 and not getattr(self, "record_past", False):
            # The base class keeps the last W - 1 tokens by `[-W + 1:]`, which is all when W is 1.
            self.keys, self.values = self.keys[:, :, :0], self.values[:, :, :0]
        if not self.sinks:
            return keys, values
        return torch.cat([self.sink_keys, keys], dim=2), torch.cat(
            [self.sink_values, values], dim=2
        )

    def _keep_sinks(self, key_states: torch.Tensor, value_states: torch.Tensor, first: int) -> None:
        """Copy the sinks among new tokens, of which the first is at position `first`."""
        batch, heads, count, width = key_states.shape
        place = torch.arange(self.sinks, device=key_states.device)[None] - first
        if self.starts is not None:
            place = place + self.starts[:, None].to(place.device)
        is_new = ((place >= 0) & (place < count))[:, None, :, None]
        index = place.clamp(0, count - 1)[:, None, :, None].expand(batch, heads, -1, width)
        if self.sink_keys is None:
            self.sink_keys = key_states.new_zeros(batch, heads, self.sinks, width)
            self.sink_values = torch.zeros_like(self.sink_keys)
        self.sink_keys = torch.where(is_new, key_states.gather(2, index), self.sink_keys)
        self.sink_values = torch.where(is_new, value_states.gather(2, index), self.sink_values)

    def _change_sinks(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.sink_keys is not None:
            self.sink_keys, self.sink_values = change(self.sink_keys), change(self.sink_values)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.starts = self.sink_keys = self.sink_values = None
        self.latest_start = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Follow beam search."""
        super().reorder_cache(beam_idx)
        self._change_sinks(lambda sinks: sinks.index_select(0, beam_idx.to(sinks.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        super().batch_repeat_interleave(repeats)
        self._change_sinks(lambda sinks: sinks.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some sequences."""
        super().batch_select_indices(indices)
        self._change_sinks(lambda sinks: sinks[indices, ...])


def describe(*arguments: Any, config: Any, **options: Any) -> Rows:
    """`describe_rows`, but for packed sequences under a window of one token.

    There no token sees the one before it, packed or not. `forward` refuses such sequences.
    """
    one = config.hybrid["mask"]["window_tokens"] == 1
    skip = options.pop("allow_is_causal_skip", False) or one
    return describe_rows(*arguments, allow_is_causal_skip=skip, **options)


AttentionInterface.register(NAME, hybrid_attention)
AttentionMaskInterface.register(NAME, describe)


class HybridForCausalLM(PlainForCausalLM):
    """The model of modeling_hybrid.py with the attention above, and a cache that fits it."""

    attention = NAME

    def cache_layer(self, kind: str) -> DynamicLayer:
        """A cache layer for a decoder layer of one of the plan's kinds."""
        mask = self.config.hybrid["mask"]
        window, sinks = mask["window_tokens"], mask["sink_tokens"]
        keep_all = mask["full_attention_decode"]  # generated rows may look anywhere
        if keep_all or kind == "full_attention":
            return DynamicLayer()
        if window > 1 and not sinks:
            return DynamicSlidingWindowLayer(sliding_window=window)
        return SinkWindowLayer(window, sinks)

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; remembers where the prompt ends when generated rows see further."""
        if self.config.hybrid["mask"]["full_attention_decode"] and "prompt_length" not in kwargs:
            given = [inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
            prompt = next((tensor for tensor in given if tensor is not None), None)
            if prompt is not None:
                kwargs["prompt_length"] = prompt.shape[1]
        return super().generate(inputs, *args, **kwargs)

    @takes_what_the_base_takes
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        prompt_length: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute as the base class does, in the mask of this model.

        Args:
            prompt_length: under full_attention_decode, tokens of the prompt (padding included):
                rows from there on attend to everything. Without it, all rows slide but a single
                row after a filled cache, which is a generated one.
        """
        if (
            self.config.hybrid["mask"]["window_tokens"] == 1
            and attention_mask is None
            and position_ids is not None
            and bool((position_ids.diff(dim=-1) != 1).any())
        ):
            raise ValueError("packed sequences need a window of at least 2 tokens")
        if use_cache is None:
            use_cache = self.config.get_text_config().use_cache
        if use_cache or past_key_values is not None:
            past_key_values = self._fitted_cache(past_key_values)
            if self.config.hybrid["mask"]["sink_tokens"] and attention_mask is not None:
                starts = left_padding(attention_mask)
                latest = int(starts.max())
                for layer in past_key_values.layers:
                    if hasattr(layer, "set_starts"):
                        layer.set_starts(starts, latest)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            prompt_length=prompt_length,
            **kwargs,
        )
