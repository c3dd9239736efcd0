# Copyright the hybridize authors. Licensed under the Apache License, Version 2.0.
"""This checkpoint for mlx-lm: the family's own layers, with a mask and a cache for each kind.

mlx-lm runs this file because config.json names it as `model_file`, and only with
`trust_remote_code` (`--trust-remote-code`). A sliding layer sees the last `window_tokens` tokens,
the current one included, and the first `sink_tokens`; its cache holds those and no others.
"""

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from mlx_lm.models import qwen3 as base
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache

FULL = "full_attention"


@dataclass
class ModelArgs(base.ModelArgs):
    """The family's settings and the plan."""

    layer_types: list | None = None
    hybrid: dict | None = None
    rope_parameters: dict | None = None

    def __post_init__(self) -> None:
        """Read rotary settings where newer configurations keep them, and check the plan."""
        parameters = self.rope_parameters
        if parameters:
            self.rope_theta = parameters.get("rope_theta", self.rope_theta)
            plain = parameters.get("rope_type", "default") == "default"
            self.rope_scaling = None if plain else parameters
        # The settings of some families reject or rewrite a plan of their own.
        plan, self.layer_types = self.layer_types, None
        if hasattr(super(), "__post_init__"):
            super().__post_init__()
        self.layer_types = plan
        if not plan or len(plan) != self.num_hidden_layers or not self.hybrid:
            raise ValueError("config.json has no plan of hybridize for every layer")
        if self.hybrid["mask"]["full_attention_decode"]:
            raise ValueError("mlx-lm cannot tell generated tokens from the prompt's")


def sinks_mask(count: int, cache: Any, window: int, sinks: int) -> mx.array | None:
    """What `count` new tokens of a layer with sinks see, as (count, keys) of bool.

    The keys are those of the cache in order of position (see RotatingKVCache): everything, or the
    sinks and the window - 1 tokens before the new ones.
    """
    if count == 1:
        # The cache holds just what the next token sees.
        return None
    if cache is not None and type(cache) is not RotatingKVCache:
        raise ValueError("layers with sink tokens are computed for one sequence at a time")
    offset = 0 if cache is None else cache.offset
    kept = min(offset, window + sinks - 1)
    gone = offset - kept
    old = mx.arange(kept)
    old = mx.where(old < sinks, old, old + gone)
    new = mx.arange(offset, offset + count)
    keys = mx.concatenate([old, new])[None]
    rows = new[:, None]
    return (keys <= rows) & ((rows - keys < window) | (keys < sinks))


class Model(base.Model):
    """The family's model with a mask for each kind of layer."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(replace(args, layer_types=[FULL] * args.num_hidden_layers))
        self.args = args
        mask = args.hybrid["mask"]
        self._window, self._sinks = mask["window_tokens"], mask["sink_tokens"]

    def __call__(
        self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        """Logits (batch, tokens, vocabulary)."""
        body = self.model
        hidden = body.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        caches = cache or [None] * len(body.layers)
        masks: dict = {}
        layers = zip(self.args.layer_types, body.layers, caches, strict=True)
        for kind, layer, layer_cache in layers:
            if kind not in masks:
                masks[kind] = self._mask(kind, hidden, layer_cache)
            hidden = layer(hidden, masks[kind], layer_cache)
        hidden = body.norm(hidden)
        if self.args.tie_word_embeddings:
            return body.embed_tokens.as_linear(hidden)
        return self.lm_head(hidden)

    def _mask(self, kind: str, hidden: mx.array, cache: Any) -> Any:
        if kind == FULL:
            return create_attention_mask(hidden, cache)
        if self._sinks == 0:
            return create_attention_mask(hidden, cache, window_size=self._window)
        return sinks_mask(hidden.shape[1], cache, self._window, self._sinks)

    def make_cache(self) -> list:
        """A cache for each layer; a sliding layer's holds the window and the sinks."""
        size = self._window + self._sinks
        return [
            KVCache() if kind == FULL else RotatingKVCache(max_size=size, keep=self._sinks)
            for kind in self.args.layer_types
        ]
