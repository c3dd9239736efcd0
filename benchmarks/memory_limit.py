"""A command under a memory limit that the kernel enforces."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


@contextmanager
def limited_group(limit_bytes: int) -> Iterator[Path | None]:
    """A memory control group: a process whose id is written to its `cgroup.procs` is killed above.

    Anonymous memory and the page cache count together; swap, where the kernel lets it be limited,
    is not given. None where this machine does not let us make one.
    """
    old = (_ROOT / "memory" / "memory.limit_in_bytes").exists()
    group = (_ROOT / "memory" if old else _ROOT) / f"hybridize-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        yield None
        return
    try:
        name = "memory.limit_in_bytes" if old else "memory.max"
        (group / name).write_text(str(limit_bytes))
        swap = group / ("memory.memsw.limit_in_bytes" if old else "memory.swap.max")
        if swap.exists():
            swap.write_text(str(limit_bytes) if old else "0")
        yield group
    finally:
        group.rmdir()


def peak_of(group: Path) -> int:
    """The most memory that a group has held, in bytes, its page cache included."""
    for name in ("memory.max_usage_in_bytes", "memory.peak"):
        if (group / name).exists():
            return int((group / name).read_text())
    return 0
