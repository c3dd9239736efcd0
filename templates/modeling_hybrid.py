# Copyright the hybridize authors. Licensed under the Apache License, Version 2.0.
"""Hybrid attention for a pretrained model: some layers attend fully, the others through a window.

Written by `hybridize` into every checkpoint it makes. It needs torch and transformers only.

`config.layer_types` says of each layer whether it is `full_attention` or `sliding_attention`.
`config.hybrid["mask"]` says what a sliding layer sees. The token at position q attends to position
p <= q when

    p > q - window_tokens: the window, the token itself included,
    or p < sink_tokens: the first tokens, kept for ever,
    or full_attention_decode and q is generated: only the prompt slides.

Positions count real tokens: left padding is skipped, packed sequences each start at 0.

How it works: transformers lets a model name its own attention function. Every layer of the base
class then calls `hybrid_attention` below, which looks up the layer's kind and computes exactly the
mask above in blocks of rows, reading only the keys that a block can see. Nothing else of the base
class changes, so its weights fit as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
from transformers import Qwen3Config as HybridConfig
from transformers import Qwen3ForCausalLM as BaseForCausalLM
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

NAME = "hybrid_attention"

# Rows per block. A block of rows reads window + block keys, so small blocks waste little; below
# about a hundred rows the matrix products get too small to be fast.
BLOCK_ROWS = 128


@dataclass(frozen=True)
class Rows:
    """What a layer must know about the rows it computes, beside their queries.

    Attributes:
        first: position of the first row among all tokens so far, padding included.
        real: (batch, tokens) bool, False on padding; None when there is none.
        start: (batch, tokens) int, where each token's own sequence starts: after the left padding,
            or at the packed sequence's first token. None when all start at 0.
        latest_start: the largest `start`.
        packed: whether several sequences stand in one row of the batch.
    """

    first: int
    real: torch.Tensor | None = None
    start: torch.Tensor | None = None
    latest_start: int = 0
    packed: bool = False


def describe_rows(
    q_length: int,
    q_offset: int,
    mask_function: Callable[..., Any],
    config: Any,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 1,
    **_: Any,
) -> Rows:
    """Stand in for transformers' mask creation: describe the rows instead of making a mask.

    Called once per forward pass and layer kind, with the arguments of
    `transformers.masking_utils.AttentionMaskInterface` functions.
    """
    first = int(q_offset)
    if attention_mask is not None:
        if bool(attention_mask.all()):
            return Rows(first)
        padding = attention_mask.int().argmax(dim=1, keepdim=True)
        return Rows(first, attention_mask, padding.expand_as(attention_mask), int(padding.max()))
    # Packed sequences reach us inside `mask_function`: there, a sequence's first token does not
    # see the token before it. (Under a window of one token none does, so `forward` refuses them.)
    if first > 0 or q_length < 2 or config.hybrid["mask"]["window_tokens"] == 1:
        return Rows(first)
    token = torch.arange(1, q_length, device=device)
    batch = torch.arange(batch_size, device=device)[:, None]
    linked = torch.as_tensor(mask_function(batch, None, token, token - 1), device=device)
    if bool(linked.all()):
        return Rows(first)
    starts = torch.where(linked.expand(batch_size, -1), 0, token)
    start = torch.cat([starts.new_zeros(batch_size, 1), starts], dim=1).cummax(dim=1).values
    return Rows(first, start=start, latest_start=int(start.max()), packed=True)


@dataclass(frozen=True)
class Sight:
    """What the rows of one layer see, as positions among all tokens.

    Attributes:
        window: window_tokens of a sliding layer; None in a full one.
        sinks: sink_tokens.
        generated_from: rows from this position on see everything.
    """

    window: int | None
    sinks: int
    generated_from: int


def sight_of(
    config: Any, layer: int, rows: Rows, row_count: int, prompt_length: int | None
) -> Sight:
    """What one layer's rows see, from the configuration."""
    mask = config.hybrid["mask"]
    slides = config.layer_types[layer] == "sliding_attention"
    generated_from = rows.first + row_count
    if mask["full_attention_decode"]:
        if rows.packed:
            raise ValueError("packed sequences have no generated rows: pass one sequence per row")
        if prompt_length is not None:
            generated_from = prompt_length
        elif rows.first > 0 and row_count == 1:
            generated_from = rows.first
    return Sight(mask["window_tokens"] if slides else None, mask["sink_tokens"], generated_from)


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
            earlier ones come from the cache, in order and without gaps.
        attention_mask: what `describe_rows` said of the rows.
        scaling: factor on the scores; 1 / sqrt(head_dim) when None.
        dropout: probability of dropping an attention weight, in training.
        prompt_length: tokens of the prompt, padding included; rows from there on are generated.

    Returns:
        (batch, rows, heads, head_dim) and None, as transformers expects.
    """
    rows = attention_mask
    if not isinstance(rows, Rows):
        raise ValueError(
            "hybrid attention makes its own masks: pass a 2-D attention_mask (1 for real tokens), "
            f"not a {type(rows).__name__}"
        )
    count = query.shape[2]
    last = rows.first + count
    sight = sight_of(module.config, module.layer_idx, rows, count, prompt_length)
    options = {"scale": scaling, "dropout_p": dropout, "enable_gqa": True}

    # Where the mask is plainly causal, torch needs no mask to be written down.
    plain = rows.real is None and not rows.packed
    if plain and count == key.shape[2] and (sight.window is None or last <= sight.window):
        output = scaled_dot_product_attention(query, key, value, is_causal=True, **options)
    elif plain and count == 1 and (sight.window is None or sight.generated_from <= rows.first):
        output = scaled_dot_product_attention(query, key, value, **options)
    else:
        # A block ends where generated rows begin, so that all its rows see by one rule.
        edges = {*range(rows.first, last, BLOCK_ROWS), last}
        if rows.first < sight.generated_from < last:
            edges.add(sight.generated_from)
        blocks = [
            attend_block(query, key, value, rows, sight, begin, end, options)
            for begin, end in pairwise(sorted(edges))
        ]
        output = torch.cat(blocks, dim=2)
    return output.transpose(1, 2).contiguous(), None


def attend_block(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: Rows,
    sight: Sight,
    begin: int,
    end: int,
    options: dict[str, Any],
) -> torch.Tensor:
    """Attention of the rows at positions begin to end, over the keys that they can see.

    Returns:
        (batch, heads, end - begin, head_dim).
    """
    first_key = rows.first + query.shape[2] - key.shape[2]
    window = None if begin >= sight.generated_from else sight.window
    # The window's keys are one span; the sinks before it are another. Left padding shifts each
    # sequence's sinks by its own amount, so that span covers them all.
    low = first_key if window is None or rows.packed else max(begin - window + 1, first_key)
    sinks_end = rows.latest_start + sight.sinks if sight.sinks else first_key
    spans = [(first_key, sinks_end), (low, end)] if sinks_end < low else [(first_key, end)]
    p = torch.cat([torch.arange(low, high, device=query.device) for low, high in spans])
    q = torch.arange(begin, end, device=query.device)[:, None]
    keys, values = (
        torch.cat([states[:, :, low - first_key : high - first_key] for low, high in spans], dim=2)
        for states in (key, value)
    )
    return scaled_dot_product_attention(
        query[:, :, begin - rows.first : end - rows.first],
        keys,
        values,
        attn_mask=visible(p, q, rows, window, sight.sinks),
        **options,
    )


def visible(
    p: torch.Tensor, q: torch.Tensor, rows: Rows, window: int | None, sinks: int
) -> torch.Tensor:
    """Which keys which rows see: the mask at the top of this file, and padding.

    Args:
        p: (keys,) positions of the keys.
        q: (rows, 1) positions of the rows.
        rows: padding and sequence starts.
        window: window_tokens, or None where everything before is seen.
        sinks: sink_tokens.

    Returns:
        bool, (batch or 1, 1, rows, keys).
    """
    start_of_key = rows.start[:, None, p] if rows.start is not None else p.new_zeros(1, 1, 1)
    seen = (p <= q)[None]
    if window is not None:
        seen = seen & ((p > q - window) | (p - start_of_key < sinks))
    if rows.start is not None and rows.packed:
        seen = seen & (start_of_key == rows.start[:, q[:, 0], None])
    if rows.real is not None:
        # A padding row sees itself: nobody reads its output, and a row that sees nothing is NaN.
        seen = (seen & rows.real[:, None, p]) | (p == q)
    return seen[:, None]


AttentionInterface.register(NAME, hybrid_attention)
AttentionMaskInterface.register(NAME, describe_rows)


class HybridForCausalLM(BaseForCausalLM):
    """The base model with the attention above and a cache that fits it."""

    config: HybridConfig

    def __init__(self, config: HybridConfig) -> None:
        chosen = config._attn_implementation
        if chosen in (None, "eager", "sdpa"):
            config._attn_implementation = NAME
        else:
            self._check_attention(config, chosen)
        super().__init__(config)
        # Some base classes look once whether any layer slides; `set_layer_types` may change that.
        if hasattr(self.model, "has_sliding_layers"):
            self.model.has_sliding_layers = True

    @staticmethod
    def _check_attention(config: HybridConfig, chosen: str | dict[str, str]) -> None:
        """Leave a plain window to other attention backends, which know it; refuse the rest."""
        mask = config.hybrid["mask"]
        if chosen != NAME and (mask["sink_tokens"] or mask["full_attention_decode"]):
            raise ValueError(
                f"attention backend {chosen!r} does not know this model's mask {mask}: "
                f"leave attn_implementation out"
            )

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Switch backends as in transformers, but never to one that would compute another mask."""
        self._check_attention(self.config, attn_implementation)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def set_layer_types(self, layer_types: list[str]) -> None:
        """Change which layers slide, between requests: the weights serve every plan."""
        self.config.layer_types = list(layer_types)

    def cache_layers(self) -> list[DynamicLayer]:
        """One cache layer for each decoder layer, holding what the mask will read again."""
        mask = self.config.hybrid["mask"]
        # Generated rows may look anywhere; sinks and a one-token window have no cache layer yet
        # that drops the rest. Keeping everything is exact, it only costs memory.
        keep_all = (
            mask["full_attention_decode"] or mask["sink_tokens"] > 0 or mask["window_tokens"] == 1
        )
        return [
            DynamicLayer()
            if keep_all or kind == "full_attention"
            else DynamicSlidingWindowLayer(sliding_window=mask["window_tokens"])
            for kind in self.config.layer_types
        ]

    @staticmethod
    def _check_cache(cache: Cache | None) -> None:
        """Refuse caches of a fixed layout: they cannot take the layers that fit the plan."""
        if cache is not None and not isinstance(cache, DynamicCache):
            raise ValueError(
                f"hybrid attention needs a DynamicCache, not a {type(cache).__name__}: "
                "leave cache_implementation out"
            )

    def _fitted_cache(self, cache: Cache | None) -> Cache:
        """The caller's cache with layers that fit the plan, or a new one."""
        cache = DynamicCache() if cache is None else cache
        self._check_cache(cache)
        wanted = self.cache_layers()
        if [type(layer) for layer in cache.layers] != [type(layer) for layer in wanted]:
            if cache.get_seq_length() > 0:
                raise ValueError("this cache was filled under another plan: start with a new one")
            if any(getattr(layer, "record_past", False) for layer in cache.layers):
                for layer in wanted:
                    if isinstance(layer, DynamicSlidingWindowLayer):
                        layer.activate_past_recording()
            cache.layers = wanted
        return cache

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; remembers where the prompt ends when generated rows see further."""
        if self.config.hybrid["mask"]["full_attention_decode"] and "prompt_length" not in kwargs:
            given = [inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
            prompt = next((tensor for tensor in given if tensor is not None), None)
            if prompt is not None:
                kwargs["prompt_length"] = prompt.shape[1]
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, which makes mask tensors ahead for static caches: refuse before."""
        self._check_cache(kwargs.get("past_key_values"))
        return super().prepare_inputs_for_generation(*args, **kwargs)

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
            use_cache = self.config.use_cache
        if use_cache or past_key_values is not None:
            past_key_values = self._fitted_cache(past_key_values)
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
