# Copyright the hybridize authors. Licensed under the Apache License, Version 2.0.
"""Hybrid attention for a pretrained model: some layers attend fully, the others through a window.

Written by `hybridize` into every checkpoint it makes. It needs torch and transformers only.

`config.layer_types` says of each layer whether it is `full_attention` or `sliding_attention`. In a
sliding layer the token at position q attends to positions q - window_tokens < p <= q. Where the
base class reads more from there, because layers of the original are of several kinds, the same
stands in `config.hybrid["layer_types"]`, and layers of other kinds stay as they are.

Positions count real tokens: left padding is skipped, packed sequences each start at 0.

How it works: transformers lets a model name its own attention function. Every layer of the base
class then calls `hybrid_attention` below, which looks up the layer's kind and computes exactly the
mask above, by attention_hybrid.py. Nothing else of the base class changes, so its weights fit as
they are.
"""

from collections.abc import Callable, Iterable
from hashlib import sha256
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch.nn.functional import pad

if Version(transformers.__version__) < Version("5.4"):
    raise ImportError(
        "this checkpoint's code needs transformers 5.4 or newer, not "
        f"{transformers.__version__}: pip install -U transformers"
    )

from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
from transformers import Qwen3Config as HybridConfig
from transformers import Qwen3ForCausalLM as BaseForCausalLM
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .attention_hybrid import Options, Rows, attend

# What transformers calls this attention. Checkpoints with other files than this one may share a
# process, so the name is this module's own: none of them takes it over.
_OWN = [Path(__file__), Path(__file__).with_name("attention_hybrid.py")]
_DIGEST = sha256(__name__.encode() + b"".join(file.read_bytes() for file in _OWN)).hexdigest()
NAME = f"hybrid_attention_{_DIGEST[:16]}"

# The kinds of layers that no plan changes.
OTHERS = ("linear_attention", "own_sliding_attention")


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


def layer_kinds(config: Any) -> list[str]:
    """What each layer does; `own_sliding_attention` slides by the window of the original."""
    kinds: list[str] = config.hybrid.get("layer_types") or config.layer_types
    return kinds


def window_of(module: Any) -> int | None:
    """The window of a layer; None where it attends fully."""
    kind = layer_kinds(module.config)[module.layer_idx]
    if kind == "full_attention":
        return None
    if kind == "own_sliding_attention":
        return int(module.config.sliding_window)
    return int(module.config.hybrid["mask"]["window_tokens"])


AttentionInterface.register(NAME, hybrid_attention)
AttentionMaskInterface.register(NAME, describe_rows)


def takes_what_the_base_takes(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Tell `generate`, which reads signatures, of the base's arguments, such as images."""
    own = signature(forward)
    named = {**own.parameters, **signature(BaseForCausalLM.forward).parameters}
    every = sorted(named.values(), key=lambda parameter: parameter.kind)
    forward.__signature__ = own.replace(parameters=every)  # type: ignore[attr-defined]
    return forward


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
        # Of a multimodal model only the language model attends by the plan.
        language = config.get_text_config()
        language.hybrid = config.hybrid
        chosen = config._attn_implementation
        if chosen in (None, "eager", "sdpa"):
            language._attn_implementation = self.attention
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
        kept = self.most_useful(layers) if isinstance(layers, int) else layers
        kinds = layer_kinds(self.config)
        planned = [layer for layer, kind in enumerate(kinds) if kind not in OTHERS]
        if any(layer not in planned for layer in kept):
            raise ValueError(f"expected some of the layers {planned}, got {sorted(kept)}")
        self.set_layer_kinds(
            kind if kind in OTHERS else "full_attention" if layer in kept else "sliding_attention"
            for layer, kind in enumerate(kinds)
        )

    def most_useful(self, count: int) -> list[int]:
        """So many of what the configuration ranks, the most useful first."""
        ranking: list[int] | None = self.config.hybrid["ranking"]
        if ranking is None:
            raise ValueError(
                "this model's layers were not ranked, so a count decides nothing: name them"
            )
        if not 0 <= count <= len(ranking):
            most = len(ranking)
            raise ValueError(f"expected 0 to {most} full-attention layers, got {count}")
        return ranking[:count]

    def set_layer_kinds(self, kinds: Iterable[str]) -> None:
        """Change what each layer does, between requests; spelled as in the configuration."""
        if "layer_types" in self.config.hybrid:
            self.config.hybrid["layer_types"] = list(kinds)
        else:
            self.config.layer_types = list(kinds)

    def set_profile(self, name: str) -> None:
        """Change to one of the named plans, between requests."""
        profiles = self.config.hybrid["profiles"]
        if name not in profiles:
            raise ValueError(f"expected a profile out of {sorted(profiles)}, got {name!r}")
        self.set_full_attention_layers(profiles[name])

    def cache_layers(self) -> list[DynamicLayer]:
        """One cache layer for each decoder layer, holding what the mask will read again."""
        kinds = layer_kinds(self.config)
        # Layers of other kinds cache as transformers has it.
        others = any(kind in OTHERS for kind in kinds)
        own = DynamicCache(config=self.config).layers if others else []
        return [
            own[layer] if kind in OTHERS else self.cache_layer(kind)
            for layer, kind in enumerate(kinds)
        ]

    def cache_layer(self, kind: str) -> DynamicLayer:
        """A cache layer for a decoder layer of one of the plan's kinds."""
        if kind == "full_attention":
            return DynamicLayer()
        return DynamicSlidingWindowLayer(self.config.hybrid["mask"]["window_tokens"])

    def layout(self, layer: DynamicLayer) -> Any:
        """What a cache layer has in common with all that hold the same."""
        return type(layer)

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
        if [*map(self.layout, cache.layers)] != [*map(self.layout, wanted)]:
            if cache.get_seq_length() > 0:
                raise ValueError("this cache was filled under another plan: start with a new one")
            if any(getattr(layer, "record_past", False) for layer in cache.layers):
                for layer in wanted:
                    if hasattr(layer, "activate_past_recording"):
                        layer.activate_past_recording()
            cache.layers = wanted
        return cache

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, which makes mask tensors ahead for static caches: refuse before."""
        self._check_cache(kwargs.get("past_key_values"))
        return super().prepare_inputs_for_generation(*args, **kwargs)

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
        **kwargs: Any,
    ) -> Any:
        """Compute as the base class does, in the mask of this model."""
        if use_cache is None:
            use_cache = self.config.get_text_config().use_cache
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
