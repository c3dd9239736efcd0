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
from functools import lru_cache
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch.nn.functional import scaled_dot_product_attention

if Version(transformers.__version__) < Version("5.4"):
    raise ImportError(
        "this checkpoint's code needs transformers 5.4 or newer, not "
        f"{transformers.__version__}: pip install -U transformers"
    )

from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
from transformers import Qwen3Config as HybridConfig
from transformers import Qwen3ForCausalLM as BaseForCausalLM
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# What transformers calls this attention. Checkpoints with other files than this one may share a
# process, so the name is this module's own: none of them takes it over.
_OWN = sha256(__name__.encode() + Path(__file__).read_bytes()).hexdigest()
NAME = f"hybrid_attention_{_OWN[:16]}"

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
        packed: whether several sequences stand in one row of the batch.
    """

    first: int
    real: torch.Tensor | None = None
    start: torch.Tensor | None = None
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
        start = left_padding(attention_mask)[:, None].expand_as(attention_mask)
        return Rows(first, attention_mask, start)
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
    return Rows(first, start=start, packed=True)


def left_padding(attention_mask: torch.Tensor) -> torch.Tensor:
    """Where each sequence of a padded batch starts, from a 2-D mask: (batch,) int."""
    return attention_mask.int().argmax(dim=1)


@dataclass(frozen=True)
class Sight:
    """What the rows of one layer see, as positions among all tokens.

    Attributes:
        window: window_tokens of a sliding layer; None in a full one.
        sinks: sink_tokens of a sliding layer; 0 in a full one.
        generated_from: rows from this position on see everything.
        evicts: whether the layer's cache drops what the window has passed.
    """

    window: int | None
    sinks: int
    generated_from: int
    evicts: bool


def sight_of(
    config: Any, layer: int, rows: Rows, row_count: int, prompt_length: int | None
) -> Sight:
    """What one layer's rows see, from the configuration."""
    mask = config.hybrid["mask"]
    generated_from = rows.first + row_count
    if mask["full_attention_decode"]:
        if rows.packed:
            raise ValueError("packed sequences have no generated rows: pass one sequence per row")
        if prompt_length is not None:
            generated_from = prompt_length
        elif rows.first > 0 and row_count == 1:
            generated_from = rows.first
    if config.layer_types[layer] == "full_attention":
        return Sight(None, 0, generated_from, False)
    evicts = not mask["full_attention_decode"]
    return Sight(mask["window_tokens"], mask["sink_tokens"], generated_from, evicts)


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
    keys = keys_of(key, value, rows, count, sight)
    options = {"scale": scaling, "dropout_p": dropout, "enable_gqa": True}

    # Where the mask is plainly causal, or hides nothing, torch needs none to be written down.
    plain = rows.real is None and not rows.packed
    if plain and rows.first == 0 and (sight.window is None or last <= sight.window):
        output = scaled_dot_product_attention(
            query, keys.key, keys.value, is_causal=True, **options
        )
    elif plain and count == 1 and sees_every_key(keys, sight, rows.first):
        output = scaled_dot_product_attention(query, key, value, **options)
    else:
        # A block ends where generated rows begin, so that all its rows see by one rule.
        edges = {*range(rows.first, last, BLOCK_ROWS), last}
        if rows.first < sight.generated_from < last:
            edges.add(sight.generated_from)
        blocks = [
            attend_block(query, keys, rows, sight, begin, end, options)
            for begin, end in pairwise(sorted(edges))
        ]
        output = torch.cat(blocks, dim=2)
    return output.transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class Keys:
    """Keys and values of one layer.

    Attributes:
        key, value: (batch, kv_heads, keys, head_dim) of consecutive positions up to the newest.
        first: position of the first of them.
        sink_key, sink_value: (batch, kv_heads, sinks, head_dim) of each sequence's first tokens,
            for rows whose window does not reach back to them; None where there are none.
        sink_position: (batch or 1, sinks), where those stand.
    """

    key: torch.Tensor
    value: torch.Tensor
    first: int
    sink_key: torch.Tensor | None = None
    sink_value: torch.Tensor | None = None
    sink_position: torch.Tensor | None = None


def keys_of(key: torch.Tensor, value: torch.Tensor, rows: Rows, count: int, sight: Sight) -> Keys:
    """Find the sinks: `SinkWindowLayer` puts them before the window, else they stand in place."""
    last, sinks = rows.first + count, sight.sinks
    if not sinks or rows.packed:
        return Keys(key, value, last - key.shape[2])
    position = torch.arange(sinks, device=key.device)[None]
    if rows.start is not None:
        position = position + rows.start[:, :1]
    if sight.evicts and key.shape[2] > count:
        first = last - (key.shape[2] - sinks)
        early_key, key = key.tensor_split([sinks], dim=2)
        early_value, value = value.tensor_split([sinks], dim=2)
        return Keys(key, value, first, early_key, early_value, position)
    index = position.clamp(max=last - 1)[:, None, :, None].expand(*key.shape[:2], -1, key.shape[3])
    return Keys(key, value, 0, key.gather(2, index), value.gather(2, index), position)


def sees_every_key(keys: Keys, sight: Sight, row: int) -> bool:
    """Whether an unpadded row sees every key that its layer has at hand."""
    if sight.window is None or row >= sight.generated_from:
        return True
    return row - keys.first < sight.window and (not sight.sinks or keys.first >= sight.sinks)


def attend_block(
    query: torch.Tensor,
    keys: Keys,
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
    window = None if begin >= sight.generated_from else sight.window
    low = keys.first if window is None or rows.packed else max(begin - window + 1, keys.first)
    if rows.start is None and window is not None and not sight.sinks:
        seen = band(end - begin, begin - low, window, query.device)
    else:
        p = torch.arange(low, end, device=query.device)
        q = torch.arange(begin, end, device=query.device)[:, None]
        seen = visible(p, q, rows, window, sight.sinks)
    key, value = (s[:, :, low - keys.first : end - keys.first] for s in (keys.key, keys.value))
    if keys.sink_position is not None and low > 0:
        # A sink from `low` on is among the window's keys already.
        passed = (keys.sink_position < low)[:, None, None].expand(-1, 1, end - begin, -1)
        batch = max(passed.shape[0], seen.shape[0])
        seen = torch.cat([m.expand(batch, -1, -1, -1) for m in (passed, seen)], dim=3)
        key = torch.cat([keys.sink_key, key], dim=2)
        value = torch.cat([keys.sink_value, value], dim=2)
    query = query[:, :, begin - rows.first : end - rows.first]
    return scaled_dot_product_attention(query, key, value, attn_mask=seen, **options)


@lru_cache(maxsize=16)
def band(count: int, before: int, window: int, device: torch.device) -> torch.Tensor:
    """The mask of a block without padding or sinks, which is the same for most blocks.

    Args:
        count: rows of the block.
        before: keys before its first row.
        window: window_tokens.
        device: where the mask is needed.

    Returns:
        bool, (1, 1, count, before + count).
    """
    # Not an inference tensor: training may use it next.
    with torch.inference_mode(False):
        p = torch.arange(before + count, device=device)
        q = torch.arange(before, before + count, device=device)[:, None]
        return visible(p, q, Rows(before), window, 0)


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

    def set_starts(self, starts: torch.Tensor | None) -> None:
        """Say where the sequences start; must come before the tokens there."""
        self.starts = starts
        self.latest_start = 0 if starts is None else int(starts.max())

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


AttentionInterface.register(NAME, hybrid_attention)
AttentionMaskInterface.register(NAME, describe_rows)


class HybridForCausalLM(BaseForCausalLM):
    """The base model with the attention above and a cache that fits it.

    One checkpoint serves every plan. `from_pretrained(..., trust_remote_code=True)` also takes

        full_attention_layers: how many layers attend fully, the most useful ones first, by the
            ranking in the configuration; or the indices of those that do;
        profile: the name of one of the plans in `config.hybrid["profiles"]`;

    and `set_full_attention_layers` and `set_profile` change the plan of a loaded model.
    """

    config: HybridConfig

    def __init__(
        self,
        config: HybridConfig,
        full_attention_layers: int | list[int] | None = None,
        profile: str | None = None,
    ) -> None:
        chosen = config._attn_implementation
        if chosen in (None, "eager", "sdpa"):
            config._attn_implementation = NAME
        else:
            self._check_attention(config, chosen)
        super().__init__(config)
        # Some base classes look once whether any layer slides; switching plans may change that.
        if hasattr(self.model, "has_sliding_layers"):
            self.model.has_sliding_layers = True
        if profile is not None:
            self.set_profile(profile)
        if full_attention_layers is not None:
            self.set_full_attention_layers(full_attention_layers)

    @staticmethod
    def _check_attention(config: HybridConfig, chosen: str | dict[str, str]) -> None:
        """Refuse other backends unless the base class itself computes the plan with them."""
        if chosen != NAME and config.model_type.startswith("hybrid_"):
            raise ValueError(
                f"attention backend {chosen!r} would not compute this model's mask "
                f"{config.hybrid['mask']}: leave attn_implementation out"
            )

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Switch backends as in transformers, but never to one that would compute another mask."""
        self._check_attention(self.config, attn_implementation)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def set_full_attention_layers(self, layers: int | list[int]) -> None:
        """Change which layers attend fully, between requests: a count, or their indices."""
        total = self.config.num_hidden_layers
        if isinstance(layers, int):
            ranking = self.config.hybrid["ranking"]
            if ranking is None:
                raise ValueError(
                    "this model's layers were not ranked, so a count decides nothing: name them"
                )
            if not 0 <= layers <= total:
                raise ValueError(f"expected 0 to {total} full-attention layers, got {layers}")
            layers = ranking[:layers]
        if any(not 0 <= layer < total for layer in layers):
            raise ValueError(f"expected layers 0 to {total - 1}, got {sorted(layers)}")
        self.config.layer_types = [
            "full_attention" if layer in layers else "sliding_attention" for layer in range(total)
        ]

    def set_profile(self, name: str) -> None:
        """Change to one of the named plans, between requests."""
        profiles = self.config.hybrid["profiles"]
        if name not in profiles:
            raise ValueError(f"expected a profile out of {sorted(profiles)}, got {name!r}")
        self.set_full_attention_layers(profiles[name])

    def cache_layers(self) -> list[DynamicLayer]:
        """One cache layer for each decoder layer, holding what the mask will read again."""
        mask = self.config.hybrid["mask"]
        window, sinks = mask["window_tokens"], mask["sink_tokens"]
        keep_all = mask["full_attention_decode"]  # generated rows may look anywhere
        return [
            DynamicLayer()
            if keep_all or kind == "full_attention"
            else DynamicSlidingWindowLayer(sliding_window=window)
            if window > 1 and not sinks
            else SinkWindowLayer(window, sinks)
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

    def _fitted_cache(self, cache: Cache | None, attention_mask: torch.Tensor | None) -> Cache:
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
        padded = attention_mask is not None and not bool(attention_mask.all())
        for layer in cache.layers:
            if isinstance(layer, SinkWindowLayer):
                layer.set_starts(left_padding(attention_mask) if padded else None)
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
            past_key_values = self._fitted_cache(past_key_values, attention_mask)
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
