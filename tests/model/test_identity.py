"""Files are those that were opened, and hashes those of their bytes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from converter.common import files
from converter.common.errors import SourceError
from converter.model import identity
from converter.model.identity import WatchedFiles, hash_of, start_hashing
from converter.model.source import open_source
from tests.altering import alter_between_samples, large_model, replace_weights, truncate_weights

NAME = "model.safetensors"
LONG_AGO = (1_600_000_000_000_000_000,) * 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return large_model(tmp_path_factory.mktemp("large") / "model")


@pytest.fixture
def folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # No clock that would have to settle.
    monkeypatch.setattr(identity, "_SETTLED_NS", 0)
    return Path(shutil.copytree(model, tmp_path / "model"))


def touch(folder: Path) -> None:
    os.utime(folder / NAME, ns=LONG_AGO)


CHANGES: dict[str, tuple[Callable[[Path], object], bool]] = {
    "nothing": (lambda _folder: None, False),
    "read": (lambda folder: (folder / NAME).read_bytes(), False),
    "another name": (lambda folder: (folder / "linked").hardlink_to(folder / NAME), False),
    "a file beside it": (lambda folder: (folder / "notes.txt").write_text("x"), False),
    "replaced": (replace_weights, True),
    "replaced by the same": (
        lambda folder: shutil.copyfile(folder / NAME, folder / "new").replace(folder / NAME),
        True,
    ),
    "truncated": (truncate_weights, True),
    "altered between samples": (alter_between_samples, True),
    "touched": (touch, True),
    "gone": (lambda folder: (folder / NAME).unlink(), True),
    "config altered": (lambda folder: (folder / "config.json").write_text("{}"), True),
    "a chat template appears": (lambda f: (f / "chat_template.jinja").write_text("x"), True),
}


@pytest.mark.parametrize("case", CHANGES)
def test_files_that_are_not_those_that_were_opened_are_refused(case: str, folder: Path) -> None:
    change, counts = CHANGES[case]
    source = open_source(str(folder))
    assert source.fingerprint and source.weight_hashes
    change(folder)
    if not counts:
        source.files.check()
        return
    with pytest.raises(SourceError, match="changed while it was in use") as caught:
        source.files.check()
    assert caught.value.details.keys() == {"where", "expected", "got", "next step"}


def test_a_write_with_a_forged_time_shows_where_it_is_sampled(folder: Path) -> None:
    source, path = open_source(str(folder)), folder / NAME
    assert source.fingerprint
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(SourceError, match="changed"):
        source.files.check()


def test_a_known_hash_is_not_found_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = hash_of(folder / NAME)
    assert found == files.sha256_of(folder / NAME)
    read = list[Path]()

    def counted(path: Path) -> str:
        read.append(path)
        return files.sha256_of(path)

    monkeypatch.setattr(identity, "sha256_of", counted)
    assert hash_of(folder / NAME) == found and not read
    assert hash_of(folder / NAME, afresh=True) == found and len(read) == 1
    # Where the note cannot be read, or is of something else, it is found again.
    for note in (folder.parent / "cache" / "hybridize" / "sha256").iterdir():
        note.write_text('{"sha256": "abc"}')
    assert hash_of(folder / NAME) == found and len(read) == 2
    # Written to, whatever its time says.
    alter_between_samples(folder, forge=True)
    assert hash_of(folder / NAME) != found and len(read) == 3


def test_what_was_written_just_now_is_not_noted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "_SETTLED_NS", 60_000_000_000)
    assert hash_of(folder / NAME)
    assert not (folder.parent / "cache").exists()


def test_a_file_that_changes_while_it_is_hashed_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(path: Path) -> str:
        digest = files.sha256_of(path)
        alter_between_samples(folder)
        return digest

    monkeypatch.setattr(identity, "sha256_of", slow)
    with pytest.raises(SourceError, match="changed while it was read"):
        start_hashing([folder / NAME]).result()


def test_a_home_that_cannot_be_written_to_costs_only_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file")
    assert hash_of(folder / NAME) == hash_of(folder / NAME)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/dev/null")
    assert hash_of(folder / NAME) == files.sha256_of(folder / NAME)


def test_a_file_that_is_gone_is_one_clear_error(folder: Path) -> None:
    watched = WatchedFiles(folder, ["none.safetensors"], [])
    with pytest.raises(SourceError, match="cannot be read"):
        watched.sampled_hashes()
    with pytest.raises(SourceError, match="cannot be read"):
        hash_of(folder / "none.safetensors")
