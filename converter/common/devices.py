"""What the devices of this machine can do, and what memory they have left."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from converter.common.units import human_bytes

_log = logging.getLogger(__name__)

# As a device: all GPUs there are, by transformers' own device_map.
SPREAD = "spread"
# What the allocator and the libraries take beside what can be counted, of the whole.
_SLACK = 0.1
_CGROUPS = Path("/sys/fs/cgroup")


def automatic_device() -> str:
    """A GPU that works, or else the CPU, as torch calls it."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        try:
            torch.zeros(1, device="mps").item()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            _log.warning("the GPU (mps) cannot be used, so the CPU is: %s", error)
        else:
            return "mps"
    return "cpu"


def automatic_dtype(device: str) -> str:
    """float32 on a CPU, bfloat16 on GPUs that have it, and on others float16."""
    import torch

    kind = torch.device(device).type
    if kind == "cpu":
        return "float32"
    if kind == "cuda":
        with torch.device(device), torch.cuda.device(device):
            # Emulated, it would be slow.
            has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bfloat16 = _multiplies(device, torch.bfloat16)
    if has_bfloat16:
        return "bfloat16"
    _log.warning(
        "this GPU has no bfloat16, so float16 is used; "
        "where the losses are no numbers, use --dtype float32"
    )
    return "float16"


def _multiplies(device: str, dtype: object) -> bool:
    import torch

    try:
        ones: torch.Tensor = torch.ones(2, 2, device=device, dtype=dtype)  # type: ignore[call-overload]
        (ones @ ones).sum().item()
    except (RuntimeError, TypeError):
        return False
    return True


@dataclass(frozen=True)
class DeviceMemory:
    """What is left on a device, and what this process has of it now, in bytes."""

    free_bytes: int
    own_bytes: int


def device_memory(device: str) -> DeviceMemory:
    """The memory of a device, or of all that a model may be spread over."""
    import torch

    if device == SPREAD:
        names = [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]
        every = [device_memory(name) for name in names]
        return DeviceMemory(sum(m.free_bytes for m in every), sum(m.own_bytes for m in every))
    kind = torch.device(device).type
    if kind == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + cached
        return DeviceMemory(free, torch.cuda.memory_allocated(device))
    if kind == "mps":
        own = torch.mps.driver_allocated_memory()
        return DeviceMemory(max(0, torch.mps.recommended_max_memory() - own), own)
    return DeviceMemory(_free_in_main_memory(), process_bytes())


def process_bytes() -> int:
    """What this process has in main memory now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _free_in_main_memory() -> int:
    """What this process may still take: of the machine's, or of its container's (cgroup v2)."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        most = (_CGROUPS / "memory.max").read_text().strip()
        lines = (_CGROUPS / "memory.stat").read_text().splitlines()
        used = int((_CGROUPS / "memory.current").read_text())
    except OSError:
        return free
    if most == "max":
        return free
    # Files in the page cache go when memory is wanted.
    cached = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    return min(free, int(most) - used + cached)


@dataclass(frozen=True)
class Room:
    """What memory a run may take from now on.

    Attributes:
        free_bytes: on its device.
        host_bytes: of main memory, where that is not the device's own; else None.
        own_bytes: what the process has on its device already.
        told: how much all that is, for the user.
        asked: whether the user has said so.
    """

    free_bytes: int
    host_bytes: int | None
    own_bytes: int
    told: str
    asked: bool

    def whole_bytes(self, free_bytes: int) -> int:
        """What would have to be allowed in all, for so much to be free."""
        return int((free_bytes + self.own_bytes) / (1 - _SLACK))


def room_on(device: str, memory_bytes: int | None, sharing: int = 1) -> Room:
    """What a run may take on a device that so many processes share.

    Args:
        memory_bytes: in all, what the process has there already included; None for what is free.
    """
    now = device_memory(device)
    free = now.free_bytes // sharing
    most = now.own_bytes + free
    if memory_bytes is not None:
        most = min(most, memory_bytes)
    host = None
    if device != "cpu":
        host = int(_free_in_main_memory() * (1 - _SLACK)) // sharing
    asked = memory_bytes is not None and memory_bytes == most
    told = human_bytes(most) if asked else f"the {human_bytes(free)} that are free"
    return Room(int(most * (1 - _SLACK)) - now.own_bytes, host, now.own_bytes, told, asked)
