"""Calibration data on the Hub: `hub:OWNER/NAME`, `hub:OWNER/NAME@REVISION/FILE`.

A set is read from one file of a data set's repository, which is all that is downloaded. Before
anything is measured, its name is completed by the commit and the file, so that what was measured
says which bytes it was measured on.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, unquote

from converter.common.errors import DataError
from converter.common.files import check_free_space
from converter.common.units import human_bytes

_log = logging.getLogger(__name__)

_NAMED = re.compile(r"hub:(?P<name>[^/@,=]+/[^/@,=]+)(?:@(?P<at>[^/,]+))?(?:/(?P<file>[^,]+))?")
_SPELLINGS = "hub:OWNER/NAME, hub:OWNER/NAME/FILE or hub:OWNER/NAME@REVISION/FILE"
# It is read into memory as a whole.
_LARGEST_BYTES = 4 << 30
_FILES_TOLD = 8


def is_on_hub(source: str) -> bool:
    """Whether a source of data is one of the Hub's."""
    return _NAMED.fullmatch(source) is not None


def sets_on_hub(data: str) -> list[str]:
    """Those of the sets of a `--data` that are on the Hub."""
    return [match[0] for match in _NAMED.finditer(data)]


def pinned(data: str, kinds: Collection[str], *, offline: bool) -> str:
    """A `--data` in which every set of the Hub is named by its commit and file, which are here.

    Args:
        data: as the user wrote it.
        kinds: endings of the names of files that can be read.
        offline: look only at what was downloaded before.

    Raises:
        DataError: a set is not written as it must be, is not there, or has several such files.
    """

    def complete(match: re.Match[str]) -> str:
        name, at, file = match["name"], match["at"], match["file"]
        return _fetched(name, None if at is None else unquote(at), file, kinds, offline)

    return _NAMED.sub(complete, data)


def local_path(source: str) -> Path:
    """Where the file of a set is that `pinned` has named.

    Raises:
        DataError: it is not there, or the name lacks commit or file.
    """
    from huggingface_hub import try_to_load_from_cache

    match = _NAMED.fullmatch(source)
    if match is None:
        raise DataError("this is no data set of the Hub", where=source, expected=_SPELLINGS)
    name, at, file = match["name"], match["at"], match["file"]
    revision = None if at is None else unquote(at)
    cached = partial(try_to_load_from_cache, name, repo_type="dataset", revision=revision)
    found = cached(file) if file else None
    if not isinstance(found, str):
        raise DataError("this data set has not been downloaded", where=source)
    return Path(found)


def _fetched(
    name: str, revision: str | None, file: str | None, kinds: Collection[str], offline: bool
) -> str:
    """Download the file of a set where it is not there, and name it in full."""
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

    from converter.common.hub import RetryPolicy, downloading, with_retries

    where = f"hub:{name}"
    asked: dict[str, Any] = {"repo_type": "dataset", "revision": revision}
    absent = "the data set is not in the local Hub cache"
    with downloading("data set", where, DataError, absent, offline=offline):
        if offline:
            folder = Path(snapshot_download(name, local_files_only=True, **asked))
            here = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
            chosen = _chosen([path.as_posix() for path in here], file, kinds, where)
            return _named(name, folder.name, chosen)
        look = partial(HfApi().dataset_info, name, revision=revision, files_metadata=True)
        info = with_retries(look, RetryPolicy(), _log.warning)
        sizes = {one.rfilename: one.size or 0 for one in info.siblings or ()}
        chosen = _chosen(list(sizes), file, kinds, where)
        _check_size(sizes[chosen], f"{where}/{chosen}")
        # By the name that was asked for, which offline runs will ask for again.
        take = partial(hf_hub_download, name, chosen, **asked)
        cache = Path(constants.HF_HUB_CACHE)
        cache.mkdir(parents=True, exist_ok=True)
        check_free_space(cache, sizes[chosen], "free some space, or point HF_HOME elsewhere")
        path = PurePosixPath(with_retries(take, RetryPolicy(), _log.warning))
        depth = len(PurePosixPath(chosen).parts)
        return _named(name, path.parts[-1 - depth], chosen)


def _named(name: str, commit: str, file: str) -> str:
    return f"hub:{name}@{quote(commit, safe='')}/{file}"


def _check_size(size: int, where: str) -> None:
    if size > _LARGEST_BYTES:
        raise DataError(
            "the file is larger than any that is read",
            where=where,
            expected=f"at most {human_bytes(_LARGEST_BYTES)}",
            got=human_bytes(size),
            next_step="name a smaller file of the data set, or download it and keep some rows",
        )


def _chosen(files: list[str], asked: str | None, kinds: Collection[str], where: str) -> str:
    """The file to read: the one that was asked for, or the only one that can be."""
    if asked is not None:
        if asked not in files:
            told = _told([file for file in files if _can_be_read(file, kinds)])
            raise DataError("the data set has no such file", where=where, expected=told, got=asked)
        return asked
    readable = [file for file in files if _can_be_read(file, kinds)]
    if len(readable) != 1:
        problem = "the data set has several files" if readable else "no file of it can be read"
        raise DataError(
            problem,
            where=where,
            expected=f"one file of these kinds: {', '.join(kinds)}",
            got=_told(readable) or _told(files),
            next_step=f"name the file: {where}/FILE" if readable else None,
        )
    return readable[0]


def _can_be_read(file: str, kinds: Collection[str]) -> bool:
    """Whether it is data: cards and what describes a data set are not."""
    path = PurePosixPath(file)
    described = path.name in ("README.md", "dataset_infos.json", "dataset_dict.json")
    return path.suffix in kinds and not described and not path.name.startswith(".")


def _told(files: list[str]) -> str:
    more = ", ..." if len(files) > _FILES_TOLD else ""
    return ", ".join(sorted(files)[:_FILES_TOLD]) + more
