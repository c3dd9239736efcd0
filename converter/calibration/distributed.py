"""Several processes at one measurement, as `torchrun` starts them."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from typing import TypeVar

from converter.common.errors import UsageError

Item = TypeVar("Item")
# How often a process looks whether its launcher is still there.
_LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work; what is local is on its machine."""

    rank: int
    count: int
    local_rank: int
    local_count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the one that prints and writes results."""
        return self.rank == 0

    def on_device(self, device: str) -> int:
        """How many of them use a device of this machine, each taking GPUs in turn."""
        if not device.startswith("cuda"):
            return self.local_count
        import torch

        return math.ceil(self.local_count / torch.cuda.device_count())

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of the items."""
        return items[self.rank :: self.count]

    def from_leader(self, value: Item) -> Item:
        """What the leader passes in, for everyone."""
        if self.count == 1:
            return value
        import torch.distributed as distributed

        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def everyones(self, value: Item) -> list[Item]:
        """What each process passes in, in the order of ranks."""
        if self.count == 1:
            return [value]
        import torch.distributed as distributed

        gathered: list[Item] = [value] * self.count
        distributed.all_gather_object(gathered, value)
        return gathered


ALONE = Processes(0, 1, 0)


def refuse_several_processes(command: str) -> None:
    """Refuse, by a UsageError, a command that several processes would write one folder with."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "only calibrate shares its work between processes",
            got=f"torchrun ... {command}",
            next_step="torchrun -m converter calibrate SOURCE --out scores.json, and then, alone: "
            f"hybridize {command} --scores scores.json",
        )


def _end_with(launcher: int) -> None:
    """End this process when the one that started it is gone: nobody would read its result.

    What it has found is on disk. Waiting for the others, it would notice only much later.
    """
    while os.getppid() == launcher:
        time.sleep(_LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """The processes that `torchrun` started, or this one alone.

    They exchange numbers a few hundred bytes at a time, so gloo does whatever the devices are.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or "RANK" not in os.environ:
        yield ALONE
        return
    from datetime import timedelta

    import torch.distributed as distributed

    Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    # A round ends when the slowest process has done its part, which may take hours.
    distributed.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield Processes(
            distributed.get_rank(),
            distributed.get_world_size(),
            int(os.environ["LOCAL_RANK"]),
            int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        )
    finally:
        distributed.destroy_process_group()
