"""What full layers cost in vLLM's KV cache, whose groups of layers all have one size."""

from __future__ import annotations

from dataclasses import dataclass

from converter.model.dimensions import ModelDimensions
from converter.model.mask import Mask


def held_layers(full_layers: int, layers: int) -> tuple[int, int]:
    """How many full and sliding layers vLLM keeps memory for.

    Full and sliding layers are split into groups of one size: the smaller count, or the larger one
    when that is less than half as large again. The last group of each kind is filled up with
    layers that nobody uses. One kind alone is one group.
    Source: `_get_kv_cache_groups_uniform_page_size` in vllm/v1/core/kv_cache_utils.py (0.32.0).
    """
    sliding_layers = layers - full_layers
    fewer, more = sorted((full_layers, sliding_layers))
    if fewer == 0:
        return full_layers, sliding_layers
    size = more if more < 1.5 * fewer else fewer
    return -(-full_layers // size) * size, -(-sliding_layers // size) * size


@dataclass(frozen=True)
class VllmCache:
    """The KV cache of one sequence in vLLM.

    Attributes:
        full_layers, sliding_layers: what memory is held for, filled groups included.
        bytes: keys and values of these layers. While a prompt is read, sliding layers hold the
            tokens of a batch (`--max-num-batched-tokens`) besides.
        better: counts of full layers to choose instead, where groups are filled with full layers:
            the next smaller one that takes no more than this count would unfilled, and the
            cheapest of the larger ones that take no more than it does.
    """

    full_layers: int
    sliding_layers: int
    bytes: int
    better: tuple[int, ...]

    @property
    def layers_held(self) -> str:
        """The layers that memory is held for, in words."""
        return f"as much as {self.full_layers} full and {self.sliding_layers} sliding layers"


def vllm_cache(
    full_layers: int, mask: Mask, shape: ModelDimensions, context_tokens: int
) -> VllmCache:
    """What a number of full layers takes in vLLM under a bare window, and which count is better."""
    layers, window = shape.layers, min(context_tokens, mask.window_tokens)

    def tokens(full: int, sliding: int) -> int:
        return full * context_tokens + sliding * window

    costs = [tokens(*held_layers(count, layers)) for count in range(layers + 1)]
    held, better = held_layers(full_layers, layers), []
    if held[0] > full_layers:
        unfilled = tokens(full_layers, layers - full_layers)
        better += [n for n in range(full_layers) if costs[n] <= unfilled][-1:]
        larger = [n for n in range(full_layers + 1, layers + 1) if costs[n] <= costs[full_layers]]
        better += sorted(larger, key=lambda n: costs[n])[:1]
    size = costs[full_layers] * shape.kv_bytes_per_token
    return VllmCache(*held, size, tuple(better))
