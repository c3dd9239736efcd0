"""A stand-in for a GPU, on the CPU: what it holds meets nothing that main memory holds.

Its device calls itself `meta`, but computes. As CUDA does, it refuses to compute with tensors of
two devices, unless one of them has no dimensions. What would make the host wait for a GPU is noted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = "meta"

_MOVES = ("aten::_to_copy", "aten::copy_", "aten::to")
_WAITS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::masked_select")


class Far(torch.Tensor):
    """A tensor of the device."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Far:
        """One that holds what another has in main memory."""
        far: Far = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        far.held = held.detach()
        return far

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        return _computed(function, arguments, options or {}, [])


def far(value: Any) -> Any:
    """A tensor, or every one in some structure, on the device."""
    return tree_map(lambda t: Far(t) if type(t) is torch.Tensor else t, value)


def near(value: Any) -> Any:
    """The same in main memory; a device becomes the CPU, too."""

    def brought(leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return torch.device("cpu")
        return leaf.held if isinstance(leaf, Far) else leaf

    return tree_map(brought, value)


def move(model: torch.nn.Module) -> None:
    """Bring a model to the device."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if isinstance(tensor, torch.nn.Parameter):
                    tensors[name] = torch.nn.Parameter(Far(tensor.data), requires_grad=False)
                elif tensor is not None:
                    tensors[name] = Far(tensor)


@contextmanager
def far_device() -> Iterator[list[str]]:
    """Make tensors on the device where that is asked for; gives what the host waited for."""
    waits: list[str] = []
    with _Computing(waits), _Called(waits):
        yield waits


def _is_far(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE


def _computed(function: Any, arguments: Any, options: dict[str, Any], waits: list[str]) -> Any:
    leaves = tree_leaves((arguments, options))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    from_far = any(isinstance(t, Far) for t in tensors)
    if from_far and function._schema.name not in _MOVES:
        stray = [t for t in tensors if not isinstance(t, Far) and t.ndim]
        if stray:
            raise RuntimeError(f"{function}: tensors of two devices, {stray[0].shape} is not far")
    target = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
    stays = from_far if target is None else _is_far(target)
    if from_far and (function._schema.name in _WAITS or not stays):
        waits.append(str(function))
    output = function(*near(arguments), **near(options))
    if function._schema.is_mutable:
        return arguments[0]
    return far(output) if stays else output


class _Computing(TorchDispatchMode):
    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        return _computed(function, arguments, options or {}, self._waits)


class _Called(TorchFunctionMode):
    """What does not get to the dispatcher."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        options = dict(options or {})
        of_far = arguments and isinstance(arguments[0], Far)
        if of_far and function is torch.Tensor.tolist:
            self._waits.append("tolist")
            return near(arguments[0]).tolist()
        if of_far and function is torch.Tensor.new_tensor:
            self._waits.append("new_tensor")
            return Far(near(arguments[0]).new_tensor(*arguments[1:], **options))
        if function is torch.tensor and _is_far(options.get("device")):
            made = torch.tensor(*arguments, **options | {"device": "cpu"})
            # A list is copied to the device while the host waits; nothing is not.
            self._waits += ["tensor"] if made.numel() else []
            return Far(made)
        return function(*arguments, **options)
