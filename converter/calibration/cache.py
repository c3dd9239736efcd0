"""Finished results kept on disk as they come, so that a killed run resumes; by many processes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import fsum
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout

from converter.calibration.distributed import Processes
from converter.common.errors import OutputError, ScoresError
from converter.common.files import output_errors

Record = Mapping[str, Any]

_VERSION = 1


@dataclass(frozen=True)
class ResultLog:
    """An open file of results, and the records that earlier runs finished, in order."""

    records: tuple[Record, ...]
    path: Path
    _file: TextIO

    def append(self, record: Record) -> None:
        """Add a finished result; on disk when this returns. A full disk is an OutputError."""
        with output_errors(self.path):
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())


@contextmanager
def open_log(path: Path, fingerprint: Mapping[str, Any], *, fresh: bool) -> Iterator[ResultLog]:
    """Open the log of work that `fingerprint` describes; continue one that has the same.

    Args:
        path: the log, made when it is missing.
        fingerprint: everything that the results depend on, as plain JSON values.
        fresh: throw away what is there.

    Raises:
        ScoresError: the log belongs to other work; the message names the field that differs.
        OutputError: another process holds it, or it cannot be written.
    """
    with ExitStack() as held:
        with output_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(FileLock(f"{path}.lock").acquire(timeout=0))
            except Timeout as error:
                raise OutputError(
                    "another process is doing this work",
                    where=path,
                    next_step="wait for it, or choose another --work folder",
                ) from error
            if fresh:
                path.unlink(missing_ok=True)
            records = _earlier_records(path, fingerprint)
            file = path.open("a", encoding="utf-8")
        # What goes wrong in the caller's own work is not the log's.
        try:
            log = ResultLog(records, path, file)
            if file.tell() == 0:
                log.append({"journal": _VERSION, "fingerprint": dict(fingerprint)})
            yield log
        finally:
            with output_errors(path):
                file.close()


def _earlier_records(path: Path, fingerprint: Mapping[str, Any]) -> tuple[Record, ...]:
    """Read them, and cut off a line that a death left unfinished."""
    if not path.exists():
        return ()
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        unfinished = lines.pop()
        os.truncate(path, path.stat().st_size - len(unfinished))
    if not lines:
        return ()
    try:
        header, *records = map(json.loads, lines)
    except ValueError as error:
        raise _damaged(path) from error
    if (
        not all(isinstance(record, dict) for record in (header, *records))
        or header.get("journal") != _VERSION
        or not isinstance(header.get("fingerprint"), dict)
    ):
        raise _damaged(path)
    check_fingerprint(path, header["fingerprint"], fingerprint)
    return tuple(records)


def check_fingerprint(where: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse to mix results of different work.

    Raises:
        ScoresError: naming the first field that differs.
    """
    for field in {**expected, **found}:
        if found.get(field) != expected.get(field):
            texts = (json.dumps(of.get(field)) for of in (expected, found))
            wanted, got = (text if len(text) <= 80 else f"{text[:77]}..." for text in texts)
            raise ScoresError(
                f"earlier results belong to other work: the {field} differs",
                where=where,
                expected=wanted,
                got=got,
                next_step="pass --fresh to start over, or give the settings of the earlier run",
            )


def _damaged(path: Path) -> ScoresError:
    return ScoresError(
        "the file of earlier results is damaged",
        where=path,
        next_step="pass --fresh to start over",
    )


class ResultCache:
    """What is known, by name, `found_earlier` of it by earlier runs.

    Every process holds the same knowledge at the start and at the end of each `fill`, and appends
    what it finds to a log of its own, so that nothing found is lost with a process.
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
        """The results among `names` that are left for this process to find."""
        return self._processes.share([name for name in names if name not in self._known])

    def fill(
        self,
        names: Sequence[str],
        group: int,
        find: Callable[[Sequence[str]], Sequence[Record]],
    ) -> list[Record]:
        """The records of all results, in order; the processes share finding what is not known.

        Args:
            names: of the results wanted.
            group: how many to find at a time; a group is saved when it is found.
            find: makes the records of some results.
        """
        found: dict[str, Record] = {}
        mine = self.missing(names)
        for start in range(0, len(mine), group):
            together, started = mine[start : start + group], time.perf_counter()
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
    """Open a cache of work that is called `title` in a folder, and read what earlier runs found.

    The arguments are those of `open_log`; there may be another number of processes than last time.

    Raises:
        ScoresError: a log belongs to other work.
        OutputError: another process holds a log, or it cannot be written.
    """
    known: dict[str, Record] = {}
    if processes.leads:
        for path in sorted(folder.glob(f"{title}.rank*.jsonl")):
            if fresh:
                path.unlink()
            else:
                with output_errors(path):
                    known |= _by_name(path, _earlier_records(path, fingerprint))
    name = f"{title}.jsonl" if processes.leads else f"{title}.rank{processes.rank}.jsonl"
    # Nobody opens its own log before the leader has read, or removed, the old ones.
    known = processes.from_leader(known)
    with open_log(folder / name, fingerprint, fresh=fresh and processes.leads) as log:
        for part in processes.everyones(_by_name(folder / name, log.records)):
            known |= part
        yield ResultCache(log, known, processes)


def _by_name(path: Path, records: Sequence[Record]) -> dict[str, Record]:
    if any("name" not in record or "seconds" not in record for record in records):
        raise _damaged(path)
    return {record["name"]: record for record in records}
