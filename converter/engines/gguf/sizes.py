"""What a GGUF says of its sizes, held against the shapes of its tensors before it is believed.

llama.cpp allocates by the metadata, and aborts or never ends on some numbers that no model has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from converter.common.errors import GgufError
from converter.engines.gguf.container import Container
from converter.model.families.stock_gguf import Keys, number_of

_LAYER = re.compile(r"blk\.(\d+)\.")
_NEEDED = ("block_count", "context_length", "embedding_length", "attention.head_count")
# Sizes beyond these are no model's, and numbers made from them would not fit.
_LARGEST = 1 << 31
# Numbers that llama.cpp divides by or takes the root of.
_POSITIVE = ("rope.freq_base", "rope.freq_base_swa", "rope.scaling.factor", "logit_scale")
_ROTARY = ("rope.dimension_count", "rope.dimension_count_swa")
_EPSILON = "attention.layer_norm_rms_epsilon"


@dataclass(frozen=True)
class Sizes:
    """A model's sizes; `key_length` and `value_length` are those of one head."""

    layers: int
    context_tokens: int
    hidden: int
    heads: int
    kv_heads: int
    key_length: int
    value_length: int

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that one layer caches for one token."""
        return self.kv_heads * (self.key_length + self.value_length)


def sizes_of(container: Container) -> Sizes:
    """The sizes of a model of an architecture that we know.

    Raises:
        GgufError: one is missing, or is not what the tensors say.
    """
    arch, keys = container.arch, container.own_keys()
    for name in _NEEDED:
        size = number_of(keys, name)
        if size is None or not 0 < size < _LARGEST:
            expected = f"one number in {arch}.{name}"
            got = keys[name].value if name in keys else None
            raise GgufError(
                "the GGUF lacks a size", where=container.path, expected=expected, got=got
            )
    for name, expected in _wrong_numbers(keys):
        raise _contradiction(container, f"{arch}.{name}", expected, keys[name].value)
    layers, context, hidden, heads = (number_of(keys, name) or 0 for name in _NEEDED)
    head_dim = number_of(keys, "attention.key_length", hidden // heads) or 0
    sizes = Sizes(
        layers,
        context,
        hidden,
        heads,
        number_of(keys, "attention.head_count_kv", heads) or 0,
        head_dim,
        number_of(keys, "attention.value_length", head_dim) or 0,
    )
    _check_shapes(container, sizes)
    for name in _ROTARY:
        # Some architectures want twice the size of a head; they halve it for full layers.
        turned = number_of(keys, name, 2)
        if turned is None or not 0 < turned <= 2 * sizes.key_length or turned % 2:
            expected = f"an even number up to {2 * sizes.key_length}"
            raise _contradiction(container, f"{arch}.{name}", expected, keys[name].value)
    return sizes


def _contradiction(container: Container, what: str, expected: str, got: object) -> GgufError:
    return GgufError(
        "the GGUF's metadata cannot be true",
        where=container.path,
        expected=f"{what}: {expected}",
        got=str(got)[:100],
        next_step="download or export it again",
    )


def _wrong_numbers(keys: Keys) -> Iterator[tuple[str, str]]:
    """Numbers that no model has: their names, and what they should be."""
    for name, value in keys.items():
        if isinstance(value.value, float) and not math.isfinite(value.value):
            yield name, "a finite number"
        elif type(value.value) is int and not 0 <= value.value < _LARGEST:
            yield name, f"0 to {_LARGEST:,}"
        elif name in _POSITIVE and not (isinstance(value.value, float) and value.value > 0):
            yield name, "a number above 0"
        elif name == _EPSILON and not (isinstance(value.value, float) and 0 <= value.value < 1):
            yield name, "a number from 0 to 1"
    used, experts = (number_of(keys, f"expert_{what}", 0) or 0 for what in ("used_count", "count"))
    if used > experts:
        yield "expert_used_count", f"at most {experts}"


def _check_shapes(container: Container, sizes: Sizes) -> None:
    """Refuse sizes that are not those of the tensors."""
    keys, arch = container.own_keys(), container.arch
    shapes = {tensor.name: tensor.shape for tensor in container.tensors}
    numbers = {int(found[1]) for name in shapes if (found := _LAYER.match(name))}
    if len(numbers) != sizes.layers or max(numbers) >= sizes.layers:
        got = f"{sizes.layers}, with tensors of {len(numbers)} layers"
        raise _contradiction(container, f"{arch}.block_count", "the layers of the tensors", got)
    embedding = shapes.get("token_embd.weight")
    if embedding is None:
        raise GgufError("this GGUF holds no model", where=container.path)
    words = number_of(keys, "vocab_size", embedding[0])
    if embedding != (words, sizes.hidden):
        expected, got = f"{embedding[0]} words of {embedding[-1]}", f"{words} of {sizes.hidden}"
        raise _contradiction(container, f"{arch}.vocab_size, embedding_length", expected, got)
    rows = {
        "attn_q": sizes.heads * sizes.key_length,
        "attn_k": sizes.kv_heads * sizes.key_length,
        "attn_v": sizes.kv_heads * sizes.value_length,
    }
    for layer in range(sizes.layers):
        for part, count in rows.items():
            name = f"blk.{layer}.{part}.weight"
            if shapes.get(name, (count, sizes.hidden)) != (count, sizes.hidden):
                got = f"{count} x {sizes.hidden} by the sizes of heads in {arch}.attention"
                raise _contradiction(container, name, " x ".join(map(str, shapes[name])), got)
    if sizes.kv_heads < 1 or sizes.heads % sizes.kv_heads:
        expected = f"a divisor of {sizes.heads}"
        raise _contradiction(container, f"{arch}.attention.head_count_kv", expected, sizes.kv_heads)
