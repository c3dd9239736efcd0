"""Where hidden states wait while it is another example's turn, and copies to a device and back."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from converter.common.files import output_errors


@dataclass(frozen=True)
class Arriving:
    """Tensors on a device that a copy may not have filled yet, and what tells when it has."""

    tensors: dict[str, torch.Tensor]
    copied: Any


class DeviceCopies:
    """Copies between main memory and a device, beside the device's work.

    On CUDA from and to pinned memory, on streams of their own. Elsewhere copies are done when they
    are asked for, and what stands for streams does nothing.
    """

    # Copies out that may be under way: as many states are on the device beside those at work.
    _UNDER_WAY = 2

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        # torch.cpu has the same names, for code that does not ask where it runs.
        self._streams: Any = torch.cuda if self._is_cuda else torch.cpu
        where = (device,) if self._is_cuda else ()
        self._inward, self._outward = self._streams.Stream(*where), self._streams.Stream(*where)
        self._leaving: deque[Any] = deque()

    def send(self, tensors: Mapping[str, torch.Tensor], after: Any = None) -> Arriving:
        """Begin to copy tensors of main memory to the device, from any thread.

        Args:
            after: an event that the copies wait for, if they must.
        """
        with self._streams.stream(self._inward):
            if after is not None:
                self._inward.wait_event(after)
            sent = {
                name: (tensor.pin_memory() if self._is_cuda else tensor).to(
                    self._device, non_blocking=True
                )
                for name, tensor in tensors.items()
            }
            return Arriving(sent, self._inward.record_event())

    def receive(self, arriving: Arriving) -> dict[str, torch.Tensor]:
        """The tensors, for work from here on, which waits for the copies."""
        now = self._streams.current_stream(self._device)
        if arriving.copied is not None:
            now.wait_event(arriving.copied)
        if self._is_cuda:
            for tensor in arriving.tensors.values():
                tensor.record_stream(now)
        return arriving.tensors

    def bring(self, tensors: Mapping[str, torch.Tensor]) -> Arriving:
        """Begin to copy tensors of the device to main memory, once the work so far is done."""
        self._outward.wait_stream(self._streams.current_stream(self._device))
        with self._streams.stream(self._outward):
            brought = {name: self._brought(tensor) for name, tensor in tensors.items()}
            arriving = Arriving(brought, self._outward.record_event())
        self._leaving.append(arriving.copied)
        if self._is_cuda and len(self._leaving) > self._UNDER_WAY:
            self._leaving.popleft().synchronize()
        return arriving

    def _brought(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._is_cuda:
            # Its memory is not given to others before it is copied.
            tensor.record_stream(self._outward)
        place = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._is_cuda)
        return place.copy_(tensor, non_blocking=True)

    def finish_work(self) -> None:
        """Wait until the device has done all that was asked: then what was let go is free."""
        if self._is_cuda:
            self._streams.current_stream(self._device).synchronize()


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


class ActivationStore:
    """Tensors that wait in memory, by name."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]] = {}

    def put(self, name: str, tensors: dict[str, torch.Tensor], note: dict[str, str]) -> None:
        """Keep tensors under a name, instead of those that it had.

        Of a view only its own part is kept, not all that it is a view of.
        """
        self._kept[name] = {key: _own(tensor) for key, tensor in tensors.items()}, note

    def note(self, name: str) -> dict[str, str] | None:
        """What was noted with the tensors of a name; None when there are none."""
        return self._kept[name][1] if name in self._kept else None

    def get(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The tensors of a name, and what was noted with them."""
        return self._kept[name]

    def drop(self, name: str) -> None:
        """Forget a name."""
        self._kept.pop(name, None)


class HostStore(ActivationStore):
    """Tensors of a device that wait in main memory."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._copies = DeviceCopies(device)
        self._copied: dict[str, Any] = {}

    def put(self, name: str, tensors: dict[str, torch.Tensor], note: dict[str, str]) -> None:
        """Keep copies of tensors under a name, instead of those that it had."""
        arriving = self._copies.bring(tensors)
        self._copied[name] = arriving.copied
        super().put(name, arriving.tensors, note)

    def get(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The tensors of a name, on the device again, and what was noted with them."""
        tensors, note = super().get(name)
        sent = self._copies.send(tensors, after=self._copied[name])
        return self._copies.receive(sent), note


class ActivationOffload(ActivationStore):
    """Tensors that wait in a folder, which is made when it is missing, for a device."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        with output_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._device = str(device)

    def put(self, name: str, tensors: dict[str, torch.Tensor], note: dict[str, str]) -> None:
        """Write tensors under a name, whole or not at all.

        Raises:
            OutputError: the disk is full or gone.
        """
        from safetensors.torch import save

        path = self._path(name)
        partial = path.with_suffix(".partial")
        with output_errors(path):
            partial.write_bytes(save({k: t.contiguous() for k, t in tensors.items()}, note))
            partial.replace(path)

    def note(self, name: str) -> dict[str, str] | None:
        """What was noted with the tensors of a name; None when there are none."""
        from safetensors import safe_open

        if not self._path(name).exists():
            return None
        with safe_open(self._path(name), framework="pt") as file:
            return dict(file.metadata())

    def get(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The tensors of a name, and what was noted with them."""
        from safetensors import safe_open

        with safe_open(self._path(name), framework="pt", device=self._device) as file:
            # Copied, not mapped: the file may be replaced while the tensors are in use.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata())

    def drop(self, name: str) -> None:
        """Forget a name."""
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"
