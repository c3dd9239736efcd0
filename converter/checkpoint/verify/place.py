"""Where a proof runs: on which device, in which dtype, with all layers there or one at a time."""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass

from converter.common.devices import device_memory
from converter.common.errors import UsageError
from converter.model.source import Source

# Models up to this many bytes of weights in float64 are verified in float64.
_EXACT_BYTES = 4 << 30
# Allocators and libraries take some beside what is counted.
_SPARE_BYTES = 1 << 30
_ITEM_BYTES = {"float64": 8, "float32": 4}
_STORED = {"BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Place:
    """Where a proof runs.

    Attributes:
        device: a CPU or a CUDA device of torch.
        dtype: of weights and activations, as torch names it.
        load_dtype: in which the weights are loaded, before they come to the device.
        in_turn: the device holds one layer at a time, because it has no room for all.
    """

    device: str
    dtype: str
    load_dtype: str
    in_turn: bool


def place_proof(source: Source, tokens: int, device: str, dtype: str | None) -> Place:
    """Choose where a model is proved.

    Args:
        source: the model.
        tokens: of the text that it runs on.
        device: `cpu`, or a CUDA device; anything else takes a GPU if there is one, since others
            have no float64, in which the reference computes.
        dtype: None chooses float64 for small models, else float32.

    Raises:
        UsageError: the device cannot be used.
    """
    import torch

    if device != "cpu" and not device.startswith("cuda"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    parameters = sum(math.prod(shape) for shape in source.weights.shapes.values())
    if dtype is None:
        dtype = "float64" if parameters * 8 <= _EXACT_BYTES else "float32"
    item = _ITEM_BYTES[dtype]
    in_turn = parameters * item + _working_bytes(source, tokens, item) > free_bytes(device)
    # As they are stored they need not be copied, and every float32 is exactly what was stored.
    stored = {tensor.dtype for tensor in source.weights.tensors.values()}
    as_stored = (in_turn or device != "cpu") and len(stored) == 1
    load_dtype = _STORED.get(stored.pop(), dtype) if as_stored else dtype
    return Place(device, dtype, load_dtype, in_turn)


def free_bytes(device: str) -> int:
    """Memory that a device has left, once this process has given back what it does not use.

    Raises:
        UsageError: the device cannot be used.
    """
    if device != "cpu":
        give_back_memory()
    try:
        return device_memory(device).free_bytes
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UsageError(
            "this device cannot be used",
            where="--device",
            got=f"{device}: {str(error).splitlines()[0]}",
            expected="cpu, cuda or cuda:0",
        ) from error


def give_back_memory() -> None:
    """Free what this process does not use on its GPUs; another one runs the checkpoint there."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def _working_bytes(source: Source, tokens: int, item_bytes: int) -> int:
    """What a run takes beside the weights, at two texts in a batch."""
    shape = source.shape
    activations = 3 * shape.intermediate + 8 * shape.hidden + 4 * shape.heads * shape.head_dim
    cache = 2 * shape.layers * shape.kv_heads * shape.head_dim
    # The reference's scores in float64, of 256 rows at a time, and their softmax.
    scores = 3 * 8 * shape.heads * 256
    return tokens * (2 * item_bytes * (activations + cache) + scores) + _SPARE_BYTES
