# Copyright the hybridize authors. Licensed under the Apache License, Version 2.0.
"""Attention through a window, or full: which keys rows see, and by which kernel.

Written by `hybridize` beside modeling_hybrid.py into every checkpoint, always the same.

In a sliding layer the token at position q attends to positions q - window_tokens < p <= q, which
count real tokens: left padding is skipped, packed sequences each start at 0. Rows read only the
keys that they can see.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from torch.nn.functional import pad, scaled_dot_product_attention

# Where torch has it: flash attention with windows, for sequences of any lengths; and where that
# takes fewer KV heads than query heads.
FLASH_SINCE, GROUPS_SINCE = Version("2.11"), Version("2.12")
TORCH = Version(torch.__version__)
if TORCH >= FLASH_SINCE:
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

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

    def to(self, *place: Any, **options: Any) -> "Rows":
        """The same elsewhere: accelerate asks it before a layer on another device."""
        tensors = {"start": self.start, "begins": self.begins, "real": self.real}
        moved = {name: t.to(*place, **options) for name, t in tensors.items() if t is not None}
        return replace(self, **moved)


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
    return has_flash(capability, query.dtype, query.shape[3], TORCH)


def has_flash(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, torch_version: Version
) -> bool:
    """The same, of a CUDA card: Ampere or newer, half precision, heads of 8 to 256."""
    return (
        capability >= (8, 0)
        and dtype in (torch.float16, torch.bfloat16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and torch_version >= FLASH_SINCE
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
    (batch, heads, count, _), (kv_heads, keys) = query.shape, key.shape[1:3]
    grouped = {"enable_gqa": True}
    if TORCH < GROUPS_SINCE:
        key, value = (s.repeat_interleave(heads // kv_heads, dim=1) for s in (key, value))
        grouped = {}
    output, lse = varlen_attn(
        *(states.transpose(1, 2).flatten(0, 1) for states in (query, key, value)),
        of_rows,
        of_keys,
        count,
        keys,
        scale=scale,
        window_size=sight,
        return_aux=AuxRequest(lse=True),
        **grouped,
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
