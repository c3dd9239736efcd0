"""The sizes of a decoder that plans, costs and checks need, read from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converter.common.errors import SourceError
from converter.model.mask import FULL, LINEAR, OWN_SLIDING

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelDimensions:
    """Sizes of a decoder-only transformer.

    Attributes:
        intermediate: width of the MLP.
        vocabulary: rows of the embedding.
        context_tokens: the longest sequence the model was made for.
        kv_bytes_per_value: bytes of one cached key or value element at the checkpoint's dtype.
        kinds: what each layer is in the model itself, by the words of `mask.py`; empty where all
            attend fully.
        own_window_tokens: the window of the model's own sliding layers.
        own_kv_bytes_per_token: what one of those caches for a token, if other than a full one.
        state_bytes: what a recurrent layer keeps of one sequence, however long.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    context_tokens: int
    kv_bytes_per_value: int
    kinds: tuple[str, ...] = ()
    own_window_tokens: int = 0
    own_kv_bytes_per_token: int = 0
    state_bytes: int = 0

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """What each layer is in the model itself."""
        return self.kinds or (FULL,) * self.layers

    @property
    def full_layers(self) -> tuple[int, ...]:
        """The layers that attend fully in the model itself: those that a plan is about."""
        return tuple(i for i, kind in enumerate(self.layer_kinds) if kind == FULL)

    @property
    def first_of_every_kind(self) -> int:
        """How many of the first layers have a layer of every kind among them."""
        return 1 + max(self.layer_kinds.index(kind) for kind in set(self.layer_kinds))

    def other_cache_bytes(self, context_tokens: int) -> int:
        """What one sequence takes in the layers that no plan changes."""
        of_token = self.own_kv_bytes_per_token or self.kv_bytes_per_token
        window = min(context_tokens, self.own_window_tokens) * of_token
        return self.kinds.count(OWN_SLIDING) * window + self.kinds.count(LINEAR) * self.state_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one layer caches for one token: its keys and its values."""
        return 2 * self.kv_heads * self.head_dim * self.kv_bytes_per_value


def bytes_per_value(config: Mapping[str, Any]) -> int:
    """Bytes of one number at the checkpoint's dtype."""
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return _BYTES.get(dtype.removeprefix("torch."), 2)


def read_shape(config: Mapping[str, Any], where: object) -> ModelDimensions:
    """Read the sizes from a transformers `config.json`.

    Raises:
        SourceError: a size is missing or not a positive integer.
    """

    def size(key: str, default: int | None = None) -> int:
        value = default if config.get(key) is None else config[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise SourceError(
                f"the model's configuration has no usable {key!r}",
                where=where,
                expected="a positive integer",
                got=repr(config.get(key, "nothing")),
                next_step="check that this is the model's own config.json",
            )
        return value

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    return ModelDimensions(
        layers=size("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", max(hidden // heads, 1)),
        # Where every layer has experts, some configurations name the width of one alone.
        intermediate=size("intermediate_size", config.get("moe_intermediate_size")),
        vocabulary=size("vocab_size"),
        context_tokens=size("max_position_embeddings"),
        kv_bytes_per_value=bytes_per_value(config),
    )


def check_token(largest: int, vocabulary: int, where: object = None) -> None:
    """Refuse token ids that the embedding has no row for.

    Raises:
        SourceError: the tokenizer and the model do not belong together.
    """
    if largest >= vocabulary:
        raise SourceError(
            "the tokenizer makes tokens that the model does not know",
            where=where,
            expected=f"tokens below {vocabulary} (vocab_size)",
            got=largest,
            next_step="check that the tokenizer and the weights belong together",
        )
