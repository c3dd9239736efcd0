"""The sizes of a decoder that plans, costs and checks need, read from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converter.common.errors import SourceError

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelDimensions:
    """Sizes of a decoder-only transformer.

    Attributes:
        intermediate: width of the MLP.
        vocabulary: rows of the embedding.
        context_tokens: the longest sequence the model was made for.
        kv_bytes_per_value: bytes of one cached key or value element at the checkpoint's dtype.
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

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one layer caches for one token: its keys and its values."""
        return 2 * self.kv_heads * self.head_dim * self.kv_bytes_per_value


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
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return ModelDimensions(
        layers=size("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", max(hidden // heads, 1)),
        intermediate=size("intermediate_size"),
        vocabulary=size("vocab_size"),
        context_tokens=size("max_position_embeddings"),
        kv_bytes_per_value=_BYTES.get(dtype.removeprefix("torch."), 2),
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
