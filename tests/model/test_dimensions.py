"""Sizes read from a configuration."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from converter.common.errors import SourceError
from converter.model.dimensions import ModelDimensions, read_shape
from tests.tiny import config_of

REQUIRED = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads"),
    *("intermediate_size", "vocab_size", "max_position_embeddings"),
)


def test_every_size_is_read() -> None:
    assert read_shape(config_of(), "config.json") == ModelDimensions(
        layers=4,
        hidden=16,
        heads=4,
        kv_heads=2,
        head_dim=8,
        intermediate=24,
        vocabulary=32,
        context_tokens=512,
        kv_bytes_per_value=2,
    )


def test_what_a_config_leaves_out_follows_from_the_rest() -> None:
    absent = {"num_key_value_heads": None, "head_dim": None}
    # Mistral's configs carry "head_dim": null.
    for config in (config_of(**absent), config_of() | absent):
        shape = read_shape(config, "config.json")
        assert (shape.kv_heads, shape.head_dim) == (4, 4)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *product(REQUIRED, (None, 0, -4, "4", 4.0, True, [4])),
        *(("num_key_value_heads", 0), ("head_dim", 0)),
    ],
)
def test_a_size_that_is_not_a_positive_integer_is_refused(key: str, value: Any) -> None:
    with pytest.raises(SourceError, match=key) as caught:
        read_shape(config_of() | {key: value}, "config.json")
    assert caught.value.details["where"] == "config.json"


@pytest.mark.parametrize(
    ("keys", "size"),
    [
        ({"dtype": "float32"}, 4),
        ({"dtype": "float16"}, 2),
        ({"dtype": "bfloat16"}, 2),
        ({"dtype": None, "torch_dtype": "torch.float64"}, 8),
        ({"dtype": None, "torch_dtype": "bfloat16"}, 2),
        ({"dtype": None}, 4),
    ],
    ids=str,
)
def test_cached_values_have_the_size_of_the_dtype(keys: dict[str, Any], size: int) -> None:
    shape = read_shape(config_of(**keys), "config.json")
    assert shape.kv_bytes_per_value == size
    # One layer, one token: keys and values of two heads of width eight.
    assert shape.kv_bytes_per_token == 2 * 2 * 8 * size
