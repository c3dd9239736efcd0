# Copyright the hybridize authors. Licensed under the Apache License, Version 2.0.
"""Hybrid attention for a pretrained model: some layers attend fully, the others through a window.

Written by `hybridize` into every checkpoint it makes. It needs torch and transformers only.

`config.layer_types` says of each layer whether it is `full_attention` or `sliding_attention`. In a
sliding layer the token at position q attends to positions q - window_tokens < p <= q.

Positions count real tokens: left padding is skipped, packed sequences each start at 0.

How it works: transformers lets a model name its own attention function. Every layer of the base
class then calls `hybrid_attention` below, which looks up the layer's kind and computes exactly the
mask above, reading only the keys that the rows can see. Nothing else of the base class changes, so
its weights fit as they are.
"""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from packaging.version import Version
from torch.nn.functional import pad, scaled_dot_product_attention

if Version(transformers.__version__) < Version("5.4"):
    raise ImportError(
        "this checkpoint's code needs transformers 5.4 or newer, not "
        f"{transformers.__version__}: pip install -U transformers"
    )

from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
from transformers import Qwen3Config as HybridConfig
from transformers import Qwen3ForCausalLM as BaseForCausalLM
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# Where torch has it: flash attention with windows, for sequences of any lengths.
FLASH_SINCE = Version("2.12")
if Version(torch.__version__) >= FLASH_SINCE:
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

# What transformers calls this attention. Checkpoints with other files than this one may share a
# process, so the name is this module's own: none of them takes it over.
_OWN = sha256(__name__.encode() + Path(__file__).read_bytes()).hexdigest()
NAME = f"hybrid_attention_{_OWN[:16]}"

# Rows per block. A block of rows reads window + block keys, so small blocks waste little; below
# about a hundred rows the matrix products get too small to be fast.
BLOCK_ROWS = 128
# Of one call: elements of a mask, and bytes of keys and values where they must be copied.
MASK_ELEMENTS = 2**24
COPIED_BYTES = 2**28


@dataclass(frozen=True)
class Rows:
    """What a layer must know about the rows it computes, beside their queries.

    Left padding is a sequence of its own before the real one. Padding on the right is the end of
    the real one, where nobody that is real looks.

    Attributes:
        first: position of the first row among all tokens so far, padding included.
        start: (batch, tokens) int, where the sequence that each token belongs to starts. None when
            all start at 0.
        begins: (sequences,) int, ascending: where sequences start in the flattened batch. None
            with `start`.
        real: (batch, tokens) bool, False on padding; None unless padding stands within a sequence.
        packed: whether several real sequences stand in one row of the batch.
    """

    first: int
    start: torch.Tensor | None = None
    begins: torch.Tensor | None = None
    real: torch.Tensor | None = None
    packed: bool = False


def describe_rows(
    q_length: int,
    q_offset: int,
    mask_function: Any,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 1,
    allow_is_causal_skip: bool = False,
    **_: Any,
) -> Rows:
    """Stand in for transformers' mask creation: describe the rows instead of making a mask.

    Called once per forward pass and layer kind, with the arguments of
    `transformers.masking_utils.AttentionMaskInterface` functions.
    """
    first = int(q_offset)
    if attention_mask is not None:
        return _describe_padding(first, attention_mask)
    # Packed sequences reach us inside `mask_function`: there, a sequence's first token does not
    # see the token before it. transformers says when it hides nothing in there.
    if first > 0 or q_length < 2 or allow_is_causal_skip:
        return Rows(first)
    token = torch.arange(1, q_length, device=device)
    batch = torch.arange(batch_size, device=device)[:, None]
    linked = torch.as_tensor(mask_function(batch, None, token, token - 1), device=device)
    if bool(linked.all()):
        return Rows(first)
    starts = pad(torch.where(linked.expand(batch_size, -1), 0, token), (1, 0))
    start = starts.cummax(dim=1).values
    begins = (start == torch.arange(q_length, device=device)).flatten().nonzero()[:, 0]
    return Rows(first, start, begins, packed=True)


def _describe_padding(first: int, attention_mask: torch.Tensor) -> Rows:
    """Rows of sequences of which some tokens are padding, or none."""
    batch, tokens = attention_mask.shape
    left = left_padding(attention_mask)[:, None]
    token = torch.arange(tokens, device=attention_mask.device)
    real = attention_mask.bool()
    gap = (token > left) & real & ~real.roll(1, dims=1)
    # Both in one wait for the device.
    padded, gaps = torch.stack([(~real).any(), gap.any()]).tolist()
    if not padded:
        return Rows(first)
    start = torch.where(token < left, 0, left)
    rows = torch.arange(batch, device=left.device)[:, None] * tokens
    begins = torch.cat([rows, rows + left], dim=1).flatten()
    return Rows(first, start, begins, real if gaps else None)


def left_padding(attention_mask: torch.Tensor) -> torch.Tensor:
    """Where each sequence of a padded batch starts, from a 2-D mask: (batch,) int."""
    return attention_mask.int().argmax(dim=1)


def hybrid_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Rows,
    scaling: float | None = None,
    dropout: float = 0.0,
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

    Returns:
        (batch, rows, heads, head_dim) and None, as transformers expects.
    """
    rows = checked(attention_mask)
    options = Options(scaling, dropout)
    return attend(query, key, value, rows, window_of(module), options).contiguous(), None


def checked(attention_mask: Any) -> Rows:
    """The rows, unless a caller has made a mask by itself."""
    if not isinstance(attention_mask, Rows):
        raise ValueError(
            "hybrid attention makes its own masks: pass a 2-D attention_mask (1 for real tokens), "
            f"not a {type(attention_mask).__name__}"
        )
    return attention_mask


def window_of(module: Any) -> int | None:
    """The window of a layer; None where it attends fully."""
    if module.config.layer_types[module.layer_idx] == "full_attention":
        return None
    return int(module.config.hybrid["mask"]["window_tokens"])


class Options(NamedTuple):
    """What a layer asks for: its factor on the scores, and dropout."""

    scale: float | None
    dropout_p: float


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: Rows,
    window: int | None,
    options: Options,
) -> torch.Tensor:
    """Attention through a window, or full where it is None, by the fastest way that there is.

    Takes what `hybrid_attention` takes.

    Returns:
        (batch, rows, heads, head_dim).
    """
    count, keys = query.shape[2], key.shape[2]
    whole = rows.start is None
    if whole and count == 1 and (window is None or keys <= window):
        return attend_by_rows(query, key, value, None, options)
    if rows.real is None and takes_flash(query, options):
        return attend_flash(query, key, value, rows, window, options.scale)[0]
    if not whole:
        return attend_masked(query, key, value, rows, window, options)
    if window is None or keys <= window:
        return attend_causal(query, key, value, rows, options)
    return attend_blocks(query, key, value, rows, window, options)


def takes_flash(query: torch.Tensor, options: Options) -> bool:
    """Whether torch's flash attention for sequences of any lengths takes these queries."""
    device = query.device
    if device.type != "cuda" or torch.version.hip is not None or options.dropout_p > 0:
        return False
    capability = torch.cuda.get_device_capability(device)
    return has_flash(capability, query.dtype, query.shape[3], torch.__version__)


def has_flash(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, torch_version: str
) -> bool:
    """The same, of a CUDA card: Ampere or newer, half precision, heads of 8 to 256."""
    return (
        capability >= (8, 0)
        and dtype in (torch.float16, torch.bfloat16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and Version(torch_version) >= FLASH_SINCE
    )


def attend_flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: Rows,
    window: int | None,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend` in one call of `varlen_attn`, which aligns rows to the end of their keys.

    Returns:
        (batch, rows, heads, head_dim), and the scores' log-sum-exps, float32 (batch, rows, heads),
        which have no gradient.
    """
    (batch, _, count, _), keys = query.shape, key.shape[2]
    if rows.start is None:
        row, place = torch.arange(batch, device=query.device), torch.zeros((), dtype=torch.int)
    else:
        tokens = rows.start.shape[1]
        row, place = rows.begins // tokens, rows.begins % tokens
    last = rows.first + count
    of_rows, of_keys = (
        edges(row, place - (last - length), length, batch) for length in (count, keys)
    )
    # `left` does not count the token itself.
    sight = (-1 if window is None else window - 1, 0)
    return flash(query, key, value, of_rows, of_keys, sight, scale)


def flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    of_rows: torch.Tensor,
    of_keys: torch.Tensor,
    sight: tuple[int, int],
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`varlen_attn` for a batch, by the edges of its sequences; as `attend_flash`."""
    (batch, _, count, _), keys = query.shape, key.shape[2]
    output, lse = varlen_attn(
        *(states.transpose(1, 2).flatten(0, 1) for states in (query, key, value)),
        of_rows,
        of_keys,
        count,
        keys,
        scale=scale,
        window_size=sight,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    # On CUDA the log-sum-exps come as (heads, rows).
    return output.unflatten(0, (batch, count)), lse.T.unflatten(0, (batch, count))


def edges(row: torch.Tensor, place: torch.Tensor, length: int, batch: int) -> torch.Tensor:
    """Cumulative lengths as `varlen_attn` takes them: (sequences + 1,) int32.

    Args:
        row, place: (sequences,), in which row of the batch each sequence starts and where there.
        length: of a row of the batch.
        batch: how many rows it has.
    """
    return pad(row * length + place.clamp(0, length), (0, 1), value=batch * length).int()


def attend_causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows, options: Options
) -> torch.Tensor:
    """Rows that see every key up to their own, without padding; as `attend`."""
    (batch, heads, count, _), (kv_heads, keys) = query.shape, key.shape[1:3]
    before = keys - count
    if before > count:
        return attend_masked(query, key, value, rows, None, options)
    # The kernel takes row 0 to see key 0 alone: rows that nobody reads stand before ours.
    query = pad(query, (0, 0, before, 0)) if before else query
    # Each of the query heads that share a KV head is a batch, so that no key need be copied.
    groups = heads // kv_heads
    query = query.unflatten(1, (kv_heads, groups)).permute(2, 0, 1, 3, 4).flatten(1, 2)
    key, value = (s.flatten(0, 1).expand(groups, -1, -1, -1) for s in (key, value))
    output = scaled_dot_product_attention(query, key, value, is_causal=True, **options._asdict())
    return (
        output[:, :, before:].unflatten(1, (batch, kv_heads)).permute(1, 3, 2, 0, 4).flatten(2, 3)
    )


def attend_by_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor | None,
    options: Options,
) -> torch.Tensor:
    """Attention under a mask, (batch or 1, 1, rows, keys), or of rows that see every key.

    The query heads that share a KV head are rows of one head, which every kernel takes; as
    `attend`.
    """
    count, kv_heads = query.shape[2], key.shape[1]
    query = query.unflatten(1, (kv_heads, -1))
    groups = query.shape[2]
    seen = None if seen is None else seen.repeat(1, 1, groups, 1)
    output = scaled_dot_product_attention(
        query.flatten(2, 3), key, value, attn_mask=seen, **options._asdict()
    )
    return output.unflatten(2, (groups, count)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def attend_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: Rows,
    window: int,
    options: Options,
) -> torch.Tensor:
    """Rows behind a window, without padding; as `attend`.

    All blocks of rows whose windows are full run in one call, for their masks are the same.
    """
    first, last = rows.first, rows.first + query.shape[2]
    first_key = last - key.shape[2]
    # Blocks end with the last row. Where they begin, and up to where rows see every earlier key.
    blocks = max(0, (last - max(first, first_key + window - 1)) // BLOCK_ROWS)
    inner = last - blocks * BLOCK_ROWS
    growing = min(max(first, first_key + window), inner)
    parts = []
    if first < growing:
        near = (s[:, :, : growing - first_key] for s in (key, value))
        parts.append(attend_causal(query[:, :, : growing - first], *near, Rows(first), options))
    if growing < inner:
        near = (s[:, :, : inner - first_key] for s in (key, value))
        between = query[:, :, growing - first : inner - first]
        parts.append(attend_masked(between, *near, Rows(growing), window, options))
    if inner < last:
        near = (s[:, :, inner - window + 1 - first_key :] for s in (key, value))
        parts += attend_inner(query[:, :, inner - first :], *near, window, options)
    return torch.cat(parts, dim=1)


def attend_inner(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int, options: Options
) -> list[torch.Tensor]:
    """Whole blocks of rows, the first of which has window - 1 keys before it.

    A block's keys are a view of all keys. Gradients and dropout copy them; then as many blocks run
    in a call as fit in COPIED_BYTES.

    Returns:
        (batch, rows, heads, head_dim) of each call.
    """
    blocks, seen = blocks_of(query, key, value, window)
    step = len(blocks[0])
    if options.dropout_p > 0 or (torch.is_grad_enabled() and key.requires_grad):
        step = blocks_that_fit(blocks[1])
    outputs = (
        scaled_dot_product_attention(*states, attn_mask=seen, **options._asdict())
        for states in zip(*(states.split(step) for states in blocks), strict=True)
    )
    return [rows_of_blocks(output, key) for output in outputs]


def blocks_of(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Blocks as a batch: (blocks, batch * kv_heads, rows or keys, head_dim), and their mask.

    The query heads that share a KV head are rows of one head.
    """
    groups, width = query.shape[1] // key.shape[1], window - 1 + BLOCK_ROWS
    query = query.unflatten(2, (-1, BLOCK_ROWS)).unflatten(1, (key.shape[1], groups))
    query = query.permute(3, 0, 1, 2, 4, 5).flatten(3, 4).flatten(1, 2)
    key, value = (
        s.flatten(0, 1).unfold(1, width, BLOCK_ROWS).permute(1, 0, 3, 2) for s in (key, value)
    )
    p = torch.arange(width, device=query.device)
    seen = visible(p, p[window - 1 :, None], Rows(0), window)
    return (query, key, value), seen.repeat(1, 1, groups, 1)


def blocks_that_fit(key: torch.Tensor) -> int:
    """How many blocks' keys and values may be copied at a time."""
    return max(1, COPIED_BYTES // (2 * key[0].numel() * key.itemsize))


def rows_of_blocks(output: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """What attention gave for blocks, as rows: (batch, rows, heads, head_dim)."""
    output = output.unflatten(2, (-1, BLOCK_ROWS)).unflatten(1, key.shape[:2])
    return output.permute(1, 0, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)


def attend_masked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: Rows,
    window: int | None,
    options: Options,
) -> torch.Tensor:
    """Any rows, a call for each of their blocks, with its mask written down; as `attend`."""
    last = rows.first + query.shape[2]
    first_key = last - key.shape[2]
    step = BLOCK_ROWS if window is not None else max(BLOCK_ROWS, MASK_ELEMENTS // last)
    parts = []
    for begin in range(rows.first, last, step):
        end = min(begin + step, last)
        low = first_key if window is None else max(begin - window + 1, first_key)
        p = torch.arange(low, end, device=query.device)
        q = torch.arange(begin, end, device=query.device)[:, None]
        near = (s[:, :, low - first_key : end - first_key] for s in (key, value))
        part = query[:, :, begin - rows.first : end - rows.first]
        parts.append(attend_by_rows(part, *near, visible(p, q, rows, window), options))
    return torch.cat(parts, dim=1)


def visible(p: torch.Tensor, q: torch.Tensor, rows: Rows, window: int | None) -> torch.Tensor:
    """Which keys which rows see: the mask at the top of this file, and padding.

    Args:
        p: (keys,) positions of the keys.
        q: (rows, 1) positions of the rows.
        rows: padding and sequence starts.
        window: window_tokens, or None where everything before is seen.

    Returns:
        bool, (batch or 1, 1, rows, keys).
    """
    seen = (p <= q)[None]
    if window is not None:
        seen = seen & (p > q - window)
    if rows.start is not None:
        seen = seen & (rows.start[:, None, p] == rows.start[:, q[:, 0], None])
    if rows.real is not None:
        # A padding row sees itself: nobody reads its output, and a row that sees nothing is NaN.
        seen = (seen & rows.real[:, None, p]) | (p == q)
    return seen[:, None]


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
    attention = NAME

    def __init__(
        self,
        config: HybridConfig,
        full_attention_layers: int | list[int] | None = None,
        profile: str | None = None,
    ) -> None:
        chosen = config._attn_implementation
        if chosen in (None, "eager", "sdpa"):
            config._attn_implementation = self.attention
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

    @classmethod
    def _check_attention(cls, config: HybridConfig, chosen: str | dict[str, str]) -> None:
        """Refuse other backends unless the base class itself computes the plan with them."""
        if chosen != cls.attention and config.model_type.startswith("hybrid_"):
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
        window = self.config.hybrid["mask"]["window_tokens"]
        return [
            DynamicLayer() if kind == "full_attention" else DynamicSlidingWindowLayer(window)
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
        **kwargs: Any,
    ) -> Any:
        """Compute as the base class does, in the mask of this model."""
        if use_cache is None:
            use_cache = self.config.use_cache
        if use_cache or past_key_values is not None:
            # Where nothing is padding, no layer need look again, and wait for the device.
            flat = attention_mask is not None and attention_mask.ndim == 2
            if flat and bool(attention_mask.all()):
                attention_mask = None
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
            **kwargs,
        )
