"""What a plan saves: bytes of keys and values, and floating-point operations of prefill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from converter.evaluation.models import Variant
from converter.model.mask import OWN_SLIDING, Mask
from converter.model.source import Source
from converter.plan.plan import cache_bytes


def pairs_seen(context_tokens: int, mask: Mask | None) -> int:
    """Query-key pairs that one layer's attention looks at over a whole prompt.

    Position q of a sliding layer sees min(q + 1, window) keys and the sinks before them; without a
    mask the layer is full.
    """
    total = context_tokens * (context_tokens + 1) // 2
    if mask is None:
        return total
    # Position q hides q + 1 - window - sinks keys, where that is positive.
    hidden = max(0, context_tokens - mask.window_tokens - mask.sink_tokens)
    return total - hidden * (hidden + 1) // 2


def prefill_flop(
    source: Source, full_layers: int | Fraction, mask: Mask | None, context_tokens: int
) -> int:
    """Floating-point operations of one prefill: every matrix product of the decoder.

    A weight costs a multiplication and an addition for each token; a query-key pair costs as many
    for each channel of each head, once for the score and once for the value. The output head runs
    on the last position only; norms, rotary embeddings, the softmax and what
    a recurrent layer does with its state are left out.
    """
    shape = source.shape
    pairs = full_layers * pairs_seen(context_tokens, None)
    pairs += (len(shape.full_layers) - full_layers) * pairs_seen(context_tokens, mask)
    if own := shape.kinds.count(OWN_SLIDING):
        pairs += own * pairs_seen(context_tokens, Mask(shape.own_window_tokens))
    attention = 2 * shape.heads * shape.head_dim * pairs
    weights = source.family.weights_per_token(source.config, shape) * context_tokens
    head = shape.hidden * shape.vocabulary
    return int(2 * (weights + attention + head))


def contexts(context_tokens: int) -> tuple[int, ...]:
    """Contexts to show costs at: the model's own, halved until a 64th."""
    return tuple(sorted({max(1, context_tokens >> shift) for shift in range(7)}))


def costs(
    source: Source, variants: Sequence[Variant], mask: Mask | None
) -> dict[str, list[Mapping[str, Any]]]:
    """KV bytes and prefill operations of each variant at each context, by variant name."""
    return {
        variant.name: [
            {
                "context_tokens": tokens,
                # Without a mask nothing slides, and any will do.
                "kv_bytes": cache_bytes(full_layers, mask or Mask(1), source.shape, tokens),
                "prefill_flop": prefill_flop(source, full_layers, mask, tokens),
            }
            for tokens in contexts(source.shape.context_tokens)
        ]
        for variant in variants
        for full_layers in [variant.full_layers]
    }
