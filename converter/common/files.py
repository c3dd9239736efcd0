"""Writing so that a crash leaves the old state or the new one, and linking instead of copying."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import shlex
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from converter.common.errors import HybridizeError, OutputError

# Linux's FICLONE ioctl: share a file's blocks copy-on-write (btrfs, xfs, bcachefs).
_FICLONE = 0x40049409
# Room left on the disk for the small files of a checkpoint and the filesystem's own book-keeping.
_HEADROOM_BYTES = 16 << 20
LARGEST_JSON_BYTES = 64 << 20
# Read at a time: the interpreter's lock, which other threads may be busy with, is seldom asked for.
_HASHED_BYTES = 8 << 20


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write at `path` into one clear error."""
    try:
        yield
    except OSError as error:
        forbidden = (errno.EACCES, errno.EPERM, errno.EROFS)
        advice = dict.fromkeys(forbidden, "choose a folder you may write to") | {
            errno.ENOSPC: "free some space or choose another disk, then run the same command",
            errno.EDQUOT: "free some of your quota, then run the same command",
        }
        raise OutputError(
            "the output cannot be written",
            where=error.filename or path,
            got=error.strerror or str(error),
            next_step=advice.get(error.errno or 0),
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a temporary sibling, flushed to disk, then renamed.

    Raises:
        OutputError: the disk is full, the folder is missing or may not be written to.
    """
    partial = path.with_name(f".{path.name}.partial")
    with output_errors(path):
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object whole or not at all, in the layout of `to_text`."""
    write_text(path, to_text(value))


def to_text(value: Mapping[str, Any]) -> str:
    """JSON as this program writes it everywhere: two spaces, keys in the given order."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def open_file(
    path: Path,
    error: type[HybridizeError],
    *,
    limit_bytes: int | None = None,
    next_step: str | None = None,
) -> BinaryIO:
    """Open a file that may come from anywhere, without waiting for what is no file.

    Raises:
        error: it is missing, is a folder, a pipe or a device, or is larger than `limit_bytes`.
    """
    refusal = partial(error, where=path, next_step=next_step)
    try:
        # A named pipe would be waited for until somebody writes to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as problem:
        raise refusal("a file cannot be read", got=problem.strerror) from problem
    status = os.fstat(descriptor)
    regular = stat.S_ISREG(status.st_mode)
    if regular and (limit_bytes is None or status.st_size <= limit_bytes):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if not regular:
        got = kind_of(status.st_mode)
        raise refusal("a file cannot be read", expected="a plain file", got=got)
    raise refusal(
        "a file is too large to be read",
        expected=f"at most {limit_bytes:,} bytes",
        got=f"{status.st_size:,} bytes",
    )


def kind_of(mode: int) -> str:
    """What a path that is no plain file is, by its mode."""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def read_file(
    path: Path,
    error: type[HybridizeError],
    limit_bytes: int = LARGEST_JSON_BYTES,
    next_step: str | None = None,
) -> str:
    """The text of a file that may come from anywhere.

    Raises:
        error: as `open_file`, or it is not UTF-8.
    """
    with open_file(path, error, limit_bytes=limit_bytes, next_step=next_step) as file:
        content = file.read(limit_bytes)
    try:
        return content.decode()
    except UnicodeDecodeError as problem:
        refusal = partial(error, where=path, next_step=next_step)
        raise refusal("a file cannot be read", got="it is not UTF-8 text") from problem


def read_json_object(
    path: Path, error: type[HybridizeError], next_step: str | None = None
) -> dict[str, Any]:
    """Read a file that must hold one JSON object, all of which can be written again.

    Raises:
        error: the file is missing, is not JSON, holds something else, or is larger than anything
            that this program reads.
    """
    text = read_file(path, error, next_step=next_step)
    refusal = partial(error, where=path, next_step=next_step)
    try:
        value = parse_json(text)
    except (ValueError, RecursionError) as problem:
        raise refusal("a file is not valid JSON", got=problem) from problem
    if not isinstance(value, dict):
        raise refusal("a file does not hold a JSON object", got=type(value).__name__)
    return value


def parse_json(text: str) -> Any:
    """A JSON value, all of which can be written again.

    Raises:
        ValueError, RecursionError: it is none.
    """
    value = json.loads(text, parse_constant=_finite, parse_float=_finite)
    if "\\u" in text:
        # Half of a pair of surrogates is no text.
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _finite(text: str) -> float:
    """NaN, Infinity and what overflows to it are not JSON, and could not be written back."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a JSON number")
    return value


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a whole file, as hexadecimal."""
    digest, block = hashlib.sha256(), memoryview(bytearray(_HASHED_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def link_or_copy(original: Path, target: Path, *, copy: bool = False) -> str:
    """Make `target` a file with the bytes of `original`, as cheaply as the disk allows.

    Links the real file: a hard link to a symbolic link (as the Hub's cache uses) would break
    when the folder is moved. `copy` rules out hard links, through which a write into one file is
    a write into both.

    Returns:
        `hard link`, `reflink` or `copy`.

    Raises:
        OutputError: a copy is needed and does not fit on the disk.
    """
    real = original.resolve(strict=True)
    try:
        if not copy:
            target.hardlink_to(real)
            return "hard link"
    except OSError as error:
        # Another filesystem, or one without hard links, or one that limits or forbids them.
        if error.errno not in {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES}:
            raise
    with real.open("rb") as source, target.open("wb") as made, suppress(OSError):
        fcntl.ioctl(made.fileno(), _FICLONE, source.fileno())
        return "reflink"
    advice = f"{_FREE}, or leave out --copy" if copy else _LINKED_INSTEAD
    check_free_space(target.parent, real.stat().st_size, advice)
    shutil.copyfile(real, target)
    return "copy"


_FREE = "free some space"
_LINKED_INSTEAD = (
    f"{_FREE}, or put the output on the disk that holds the source: its weights are then linked, "
    "not copied"
)


def check_free_space(
    folder: Path, needed_bytes: int, next_step: str = f"{_FREE}, or choose another disk"
) -> None:
    """Raise OutputError unless `needed_bytes` and a little headroom are free."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes + _HEADROOM_BYTES:
        raise OutputError(
            "the disk has too little free space",
            where=folder,
            expected=f"{needed_bytes + _HEADROOM_BYTES:,} bytes",
            got=f"{free:,} bytes",
            next_step=next_step,
        )


def check_named(path: Path) -> None:
    """Raise OutputError for `.`, `..` or `/`, which cannot be replaced by another folder."""
    if path.name in ("", ".."):
        raise OutputError(
            "the output needs a name of its own",
            where=path,
            expected="a file or folder such as ../hybrid, named from outside of it",
        )


def check_absent(path: Path, force: bool) -> None:
    """Raise OutputError for an existing output without `--force`, or one without name or parent."""
    check_named(path)
    if not path.absolute().parent.is_dir():
        raise OutputError(
            "the folder to write into does not exist",
            where=path.absolute().parent,
            next_step=f"create it: mkdir -p {shlex.quote(str(path.parent))}",
        )
    if (path.exists() or path.is_symlink()) and not force:
        raise OutputError(
            "the output exists already",
            where=path,
            next_step="choose another name, or pass --force to replace it",
        )


def check_file_absent(path: Path, force: bool) -> None:
    """As `check_absent`, for an output that is a file: OutputError also where a folder is."""
    check_absent(path, force)
    if path.is_dir():
        raise OutputError(
            "the output is a folder, and a file is to be written",
            where=path,
            next_step="choose another name",
        )


@contextmanager
def building(final: Path) -> Iterator[Path]:
    """An empty folder beside `final` to build in, held against other processes.

    What a killed process left is cleared away. When the body raises, the folder is removed; when it
    neither raises nor renames it (see `finish_folder`), it stays.

    Raises:
        OutputError: another process is writing `final`, or the folder cannot be made.
    """
    partial = final.with_name(f".{final.name}.partial")
    with output_errors(partial):
        if partial.exists():
            os.close(_hold(partial, final))
            remove(partial)
        partial.mkdir()
    held = _hold(partial, final)
    try:
        yield partial
    except BaseException:
        remove(partial)
        raise
    finally:
        os.close(held)


def _hold(folder: Path, final: Path) -> int:
    """Lock a folder until the returned descriptor is closed, or the process dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another process may have found the folder before it was locked, and replaced it.
        if not os.path.samestat(os.fstat(descriptor), folder.stat()):
            raise FileNotFoundError
    except (BlockingIOError, FileNotFoundError) as error:
        os.close(descriptor)
        raise OutputError(
            "another process is writing this output",
            where=final,
            next_step="wait for it, or choose another name",
        ) from error
    return descriptor


def _replaced_sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def finish_folder(partial: Path, final: Path) -> None:
    """Rename a finished folder to its name, replacing what stood there.

    The old one steps aside first; after a crash in between, `restore_replaced` brings it back.
    """
    aside = _replaced_sibling(final)
    with output_errors(final):
        for entry in partial.rglob("*"):
            if entry.is_dir():
                sync_folder(entry)
        sync_folder(partial)
        if final.exists():
            final.rename(aside)
        try:
            partial.rename(final)
        except OSError:
            restore_replaced(final)
            raise
        sync_folder(final.parent)
        remove(aside)


def restore_replaced(final: Path) -> None:
    """Undo or finish a replacement that a crash interrupted (see `finish_folder`).

    Raises:
        OutputError: the path has no name; see `check_named`.
    """
    check_named(final)
    aside = _replaced_sibling(final)
    if not aside.exists():
        return
    with output_errors(final):
        if final.exists():
            remove(aside)
        else:
            aside.rename(final)


def is_empty_folder(path: Path) -> bool:
    """Whether `path` is a folder with nothing in it."""
    return path.is_dir() and not any(path.iterdir())


def clear_files(folder: Path, patterns: Iterable[str]) -> None:
    """Remove files by pattern with their locks, and the folder when nothing else is in it."""
    for pattern in patterns:
        for path in [*folder.glob(pattern), *folder.glob(f"{pattern}.lock")]:
            path.unlink()
    if is_empty_folder(folder):
        folder.rmdir()


def remove(path: Path) -> None:
    """Remove a file or a folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
