"""Finished examples of a measurement, kept on disk as they come, by however many processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import fsum
from pathlib import Path
from typing import Any

from converter.calibration.distributed import Processes
from converter.calibration.log import ResultLog, open_log, read_log
from converter.common.errors import ScoresError

Record = Mapping[str, Any]


class ResultCache:
    """What is known of each piece of a measurement, by the piece's name.

    Every process holds the same knowledge at the start and at the end of each `fill`, and appends
    what it finds to a journal of its own, so that nothing found is lost with a process.

    Attributes:
        found_earlier: how many pieces earlier runs found.
    """

    def __init__(self, log: ResultLog, known: Mapping[str, Record], processes: Processes) -> None:
        self._log = log
        self._known = dict(known)
        self._processes = processes
        self.found_earlier = len(known)

    @property
    def seconds(self) -> float:
        """Time that all processes spent on what is known."""
        return fsum(record["seconds"] for record in self._known.values())

    def missing(self, names: Sequence[str]) -> Sequence[str]:
        """The pieces among `names` that are left for this process to find."""
        return self._processes.share([name for name in names if name not in self._known])

    def fill(
        self,
        names: Sequence[str],
        group: int,
        find: Callable[[Sequence[str]], Sequence[Record]],
    ) -> list[Record]:
        """Find what is not known yet, sharing the work between the processes.

        Args:
            names: the pieces wanted.
            group: how many to find at a time; a group is saved when it is found.
            find: makes the records of some pieces.

        Returns:
            The records of all pieces, in the order of `names`.
        """
        found: dict[str, Record] = {}
        mine = self.missing(names)
        for start in range(0, len(mine), group):
            together = mine[start : start + group]
            started = time.perf_counter()
            records = find(together)
            seconds = (time.perf_counter() - started) / len(together)
            for name, record in zip(together, records, strict=True):
                found[name] = {"name": name, **record, "seconds": seconds}
                self._log.append(found[name])
        for part in self._processes.everyones(found):
            self._known.update(part)
        return [self._known[name] for name in names]


@contextmanager
def open_cache(
    folder: Path,
    title: str,
    fingerprint: Mapping[str, Any],
    processes: Processes,
    *,
    fresh: bool,
) -> Iterator[ResultCache]:
    """Open the notebook of a measurement, and read what earlier runs found.

    Args:
        folder: where journals are kept.
        title: what the measurement is called there.
        fingerprint: everything that results depend on, as plain JSON values.
        processes: those that share the work; another number than last time is fine.
        fresh: throw away what is there.

    Raises:
        ScoresError: a journal belongs to other work.
        OutputError: another process holds a journal, or it cannot be written.
    """
    known: dict[str, Record] = {}
    others: list[Path] = []
    if processes.leads:
        others = sorted(folder.glob(f"{title}.rank*.jsonl"))
        for path in others if fresh else ():
            path.unlink()
    name = f"{title}.jsonl" if processes.leads else f"{title}.rank{processes.rank}.jsonl"
    if processes.leads and not fresh:
        for path in others:
            known |= _by_name(path, read_log(path, fingerprint))
    # Nobody opens its own journal before the leader has read, or removed, the old ones.
    known = processes.from_leader(known)
    with open_log(folder / name, fingerprint, fresh=fresh and processes.leads) as log:
        for part in processes.everyones(_by_name(folder / name, log.records)):
            known |= part
        yield ResultCache(log, known, processes)


def _by_name(path: Path, records: Sequence[Record]) -> dict[str, Record]:
    if any("name" not in record or "seconds" not in record for record in records):
        raise ScoresError(
            "the file of earlier results is damaged",
            where=path,
            next_step="pass --fresh to start over",
        )
    return {record["name"]: record for record in records}
