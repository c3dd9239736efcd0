"""Several processes at one measurement, as `torchrun` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from converter.common.errors import UsageError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work; the local rank is that on its machine."""

    rank: int
    count: int
    local_rank: int

    @property
    def leads(self) -> bool:
        """Whether this is the one that prints and writes results."""
        return self.rank == 0

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

    # A round ends when the slowest process has done its part, which may take hours.
    distributed.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield Processes(
            distributed.get_rank(), distributed.get_world_size(), int(os.environ["LOCAL_RANK"])
        )
    finally:
        distributed.destroy_process_group()
