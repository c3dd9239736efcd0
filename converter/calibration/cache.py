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

_VERSION = 2
# Settings whose values are hashes, which say nothing to a reader.
_HASHED = {
    "source": "the model is another one",
    "weights": "the weights have other bytes",
    "questions": "the questions are others",
}


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
def open_log(path: Path, settings: Mapping[str, Any], *, fresh: bool) -> Iterator[ResultLog]:
    """Open the log of work under some settings; continue one that has the same.

    Args:
        path: the log, made when it is missing.
        settings: everything that the results depend on beside their names, as plain JSON values.
        fresh: throw away what is there.

    Raises:
        ScoresError: the log belongs to other work; the message names the settings that differ.
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
            records = _earlier_records(path, settings)
            file = path.open("a", encoding="utf-8")
        # What goes wrong in the caller's own work is not the log's.
        try:
            log = ResultLog(records, path, file)
            if file.tell() == 0:
                log.append({"journal": _VERSION, "settings": dict(settings)})
            yield log
        finally:
            with output_errors(path):
                file.close()


def _earlier_records(path: Path, settings: Mapping[str, Any]) -> tuple[Record, ...]:
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
    if not all(isinstance(record, dict) for record in (header, *records)) or not isinstance(
        header.get("journal"), int
    ):
        raise _damaged(path)
    if header["journal"] != _VERSION:
        raise ScoresError(
            "the earlier results are of another version of hybridize",
            where=path,
            next_step="pass --fresh to start over",
        )
    if not isinstance(header.get("settings"), dict):
        raise _damaged(path)
    check_settings(path, header["settings"], settings)
    return tuple(records)


def check_settings(where: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse to mix results of different work.

    Raises:
        ScoresError: naming every setting that differs.
    """

    def told(settings: Mapping[str, Any], name: str) -> str:
        return str(settings.get(name, "unknown"))[:80]

    changed = [
        _HASHED.get(name, f"{name} was {told(found, name)}, now {told(expected, name)}")
        for name in {**expected, **found}
        if found.get(name) != expected.get(name)
    ]
    if changed:
        raise ScoresError(
            f"earlier results belong to other work: {'; '.join(changed)}",
            where=where,
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
    settings: Mapping[str, Any],
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
                    known |= _by_name(path, _earlier_records(path, settings))
    name = f"{title}.jsonl" if processes.leads else f"{title}.rank{processes.rank}.jsonl"
    # Nobody opens its own log before the leader has read, or removed, the old ones.
    known = processes.from_leader(known)
    with open_log(folder / name, settings, fresh=fresh and processes.leads) as log:
        for part in processes.everyones(_by_name(folder / name, log.records)):
            known |= part
        yield ResultCache(log, known, processes)


def _by_name(path: Path, records: Sequence[Record]) -> dict[str, Record]:
    if any("name" not in record or "seconds" not in record for record in records):
        raise _damaged(path)
    return {record["name"]: record for record in records}
