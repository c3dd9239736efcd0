"""Whether a model's files are still those that were opened, and the hashes of whole files.

A file that keeps its inode, size and times has not been written to, so that its hash is found once
and known from then on: it is kept in the user's cache, by inode, beside the state it belongs to.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread

from converter.common.errors import HybridizeError, SourceError
from converter.common.files import read_json_object, sha256_of, write_json
from converter.model.weights import sampled_digest

# Clocks of file systems tick: of a file that was written to this recently, a later write may not
# show in its times.
_SETTLED_NS = 2_000_000_000


@dataclass(frozen=True)
class FileState:
    """What the file system says of a file.

    Attributes:
        modified_ns: when its contents were last written; programs can set it.
        changed_ns: when anything about it last changed, its names included; programs cannot.
    """

    device: int
    inode: int
    bytes: int
    modified_ns: int
    changed_ns: int

    def is_of(self, other: FileState | None) -> bool:
        """Whether only names, permissions or forged times can have changed since `other`."""
        fields = ("device", "inode", "bytes", "modified_ns")
        return all(getattr(self, name) == getattr(other, name, None) for name in fields)


def state_of(path: Path) -> FileState | None:
    """The state of the file that a path leads to; None where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return FileState(
        found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
    )


class WatchedFiles:
    """The files that a model is read from, as they were when it was opened.

    `sampled` are those too large to be read again and again.
    """

    def __init__(self, folder: Path, sampled: Iterable[str], others: Iterable[str]) -> None:
        self._folder = folder
        self._states = {name: state_of(folder / name) for name in (*sampled, *others)}
        self._sampled = tuple(sampled)
        self._digests: dict[str, str] = {}

    def sampled_hashes(self) -> dict[str, str]:
        """Sampled hashes of the large files, by name, of what was opened.

        Raises:
            SourceError: a file is not the one that was opened.
        """
        if not self._digests:
            found = {name: self._digest(name) for name in self._sampled}
            self.check()
            self._digests = found
        return self._digests

    def check(self) -> None:
        """Refuse files that are not those that were opened, or were written to since.

        Raises:
            SourceError: naming the first of them.
        """
        for name, before in self._states.items():
            now = state_of(self._folder / name)
            if now == before:
                continue
            # A new hard link is no change, but it looks as a write with a forged time does.
            same = now is not None and now.is_of(before)
            if not same or (name in self._digests and self._digest(name) != self._digests[name]):
                raise _changed("in use", self._folder / name, before, now)
            self._states[name] = now

    def _digest(self, name: str) -> str:
        return _read(self._folder / name, sampled_digest)


def _read(path: Path, digest_of: Callable[[Path], str]) -> str:
    try:
        return digest_of(path)
    except OSError as error:
        problem = "a file of the model cannot be read"
        raise SourceError(problem, where=path, got=error.strerror) from error


def _changed(
    during: str, path: Path, before: FileState | None, now: FileState | None
) -> SourceError:
    return SourceError(
        f"a file of the model changed while it was {during}",
        where=path,
        expected=_told(before),
        got=_told(now),
        next_step="run the command again when nothing writes to the model any more",
    )


def _told(state: FileState | None) -> str:
    if state is None:
        return "no such file"
    seconds, nanoseconds = divmod(state.modified_ns, 10**9)
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    return f"{state.bytes:,} bytes, inode {state.inode}, modified {when}.{nanoseconds:09}"


def start_hashing(paths: Iterable[Path], *, afresh: bool = False) -> Future[dict[Path, str]]:
    """SHA-256 of whole files, found by a thread while the caller does something else.

    Args:
        paths: the files, read one after another.
        afresh: read them, even when their hashes are known.

    Returns:
        The hashes; its result is a SourceError where a file cannot be read, or changes meanwhile.
    """
    found: Future[dict[Path, str]] = Future()

    def work() -> None:
        try:
            found.set_result({path: hash_of(path, afresh=afresh) for path in paths})
        except SourceError as error:
            found.set_exception(error)

    # A daemon: a command that fails or is interrupted does not wait for it.
    Thread(target=work, name="hash", daemon=True).start()
    return found


def hash_of(path: Path, *, afresh: bool = False) -> str:
    """The SHA-256 of a whole file, as hexadecimal; known when the file was hashed before.

    Raises:
        SourceError: it cannot be read, or changes meanwhile.
    """
    before, started = state_of(path), time.time_ns()
    if not afresh and before is not None and (known := _known(before)) is not None:
        return known
    digest = _read(path, sha256_of)
    after = state_of(path)
    if before is None or after is None or not after.is_of(before):
        raise _changed("read", path, before, after)
    if after == before and max(before.modified_ns, before.changed_ns) < started - _SETTLED_NS:
        _remember(before, digest)
    return digest


def _note(state: FileState) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hybridize" / "sha256" / f"{state.device}-{state.inode}.json"


def _known(state: FileState) -> str | None:
    with suppress(HybridizeError, RuntimeError):
        note = read_json_object(_note(state), SourceError)
        digest = note.pop("sha256", None)
        if note == asdict(state) and isinstance(digest, str):
            return digest
    return None


def _remember(state: FileState, digest: str) -> None:
    # Without a home that can be written to, it is only found again.
    with suppress(OSError, HybridizeError, RuntimeError):
        note = _note(state)
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, asdict(state) | {"sha256": digest})
