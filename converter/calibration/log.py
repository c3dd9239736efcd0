"""Finished pieces of long work, kept on disk as they come, so that a killed run resumes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout

from converter.common.errors import OutputError, ScoresError
from converter.common.files import output_errors

_VERSION = 1


@dataclass(frozen=True)
class ResultLog:
    """An open journal.

    Attributes:
        records: what earlier runs finished, in order.
    """

    records: tuple[Mapping[str, Any], ...]
    _file: TextIO
    _path: Path

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a finished piece; it is on disk when this returns.

        Raises:
            OutputError: the disk is full or gone.
        """
        with output_errors(self._path):
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())


@contextmanager
def open_log(path: Path, fingerprint: Mapping[str, Any], *, fresh: bool) -> Iterator[ResultLog]:
    """Open a journal for work that `fingerprint` describes; continue one that has the same.

    Args:
        path: the journal's file, made when it is missing.
        fingerprint: everything that the results depend on, as plain JSON values.
        fresh: throw away what is there.

    Raises:
        ScoresError: the journal belongs to other work; the message names the field that differs.
        OutputError: another process holds it, or it cannot be written.
    """
    lock = FileLock(f"{path}.lock")
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise OutputError(
                "another process is doing this work",
                where=path,
                next_step="wait for it, or choose another --work folder",
            ) from error
    try:
        with output_errors(path):
            if fresh:
                path.unlink(missing_ok=True)
            records = _continue(path, fingerprint)
            file = path.open("a", encoding="utf-8")
        # What goes wrong in the caller's own work is not the journal's.
        try:
            log = ResultLog(records, file, path)
            if file.tell() == 0:
                log.append({"journal": _VERSION, "fingerprint": dict(fingerprint)})
            yield log
        finally:
            with output_errors(path):
                file.close()
    finally:
        lock.release()


def read_log(path: Path, fingerprint: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The records of a journal that nobody is writing; see `open_log`."""
    with output_errors(path):
        return _continue(path, fingerprint)


def _continue(path: Path, fingerprint: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Read the records of an earlier run and cut off a line that its death left unfinished."""
    if not path.exists():
        return ()
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        unfinished = lines.pop()
        os.truncate(path, path.stat().st_size - len(unfinished))
    try:
        parsed = [json.loads(line) for line in lines]
    except ValueError as error:
        raise _not_ours(path) from error
    if not parsed:
        return ()
    header = parsed[0]
    if (
        not all(isinstance(record, dict) for record in parsed)
        or header.get("journal") != _VERSION
        or not isinstance(header.get("fingerprint"), dict)
    ):
        raise _not_ours(path)
    check_fingerprint(path, header["fingerprint"], fingerprint)
    return tuple(parsed[1:])


def check_fingerprint(where: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse to mix results of different work.

    Raises:
        ScoresError: naming the first field that differs.
    """
    for field in [*expected, *(name for name in found if name not in expected)]:
        if found.get(field) != expected.get(field):
            raise ScoresError(
                f"earlier results belong to other work: the {field} differs",
                where=where,
                expected=_short(expected.get(field)),
                got=_short(found.get(field)),
                next_step="pass --fresh to start over, or give the settings of the earlier run",
            )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _not_ours(path: Path) -> ScoresError:
    return ScoresError(
        "the file of earlier results is damaged",
        where=path,
        next_step="pass --fresh to start over",
    )
