"""Writing whole or not at all, linking, and replacing folders."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.common.errors import OutputError, PlanError, ScoresError
from converter.common.files import (
    building,
    check_absent,
    check_file_absent,
    check_free_space,
    clear_files,
    finish_folder,
    is_empty_folder,
    link_or_copy,
    open_file,
    read_file,
    read_json_object,
    remove,
    restore_replaced,
    sha256_of,
    to_text,
    write_json,
    write_text,
)

JSON_OBJECTS = st.dictionaries(
    st.text(),
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    ),
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@given(JSON_OBJECTS)
def test_json_is_read_back_as_it_was_written(value: dict[str, Any]) -> None:
    text = to_text(value)
    assert json.loads(text) == value
    assert list(json.loads(text)) == list(value)
    assert text.endswith("}\n")


def test_a_written_file_is_there_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"é": 1})
    write_json(path, {"é": 2})
    assert path.read_bytes() == '{\n  "é": 2\n}\n'.encode()
    # Line ends are not translated.
    write_text(path, "x\r\ny\n")
    assert path.read_bytes() == b"x\r\ny\n"
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("path", ["folder", "none/a"])
def test_a_file_that_cannot_be_written_leaves_nothing(path: str, tmp_path: Path) -> None:
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(OutputError, match="cannot be written"):
        write_text(tmp_path / path, "text")
    assert names(tmp_path) == ["folder"]


def test_a_file_that_fails_half_way_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new" * 10_000 + "\ud800")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_what_is_not_json_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "JSON object"),
        (b"null", "JSON object"),
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"a": -Infinity}', "not valid JSON"),
        (b"\xff", "cannot be read"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON"),
    ],
    ids=["empty", "cut", "list", "null", "nan", "infinity", "bytes", "deep", "long"],
)
def test_what_is_no_json_object_is_refused(content: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ScoresError, match=problem) as caught:
        read_json_object(path, ScoresError, "do this")
    details = caught.value.details
    assert (details["where"], details["next step"]) == (str(path), "do this")


def test_a_missing_file_is_refused_by_the_kind_of_error_asked_for(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(PlanError, match="cannot be read"):
            read_json_object(path, PlanError)


def test_a_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    content = os.urandom(300_000)
    (tmp_path / "a").write_bytes(content)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("name", ["blob", "link"])
def test_a_file_of_the_same_disk_is_linked(name: str, tmp_path: Path) -> None:
    """A symbolic link, as in the Hub's cache, would break when the folder moves."""
    (tmp_path / "blob").write_text("weights")
    (tmp_path / "link").symlink_to("blob")
    assert link_or_copy(tmp_path / name, tmp_path / "linked") == "hard link"
    assert not (tmp_path / "linked").is_symlink()
    assert (tmp_path / "linked").samefile(tmp_path / "blob")


def test_a_file_of_another_disk_is_copied(tmp_path: Path) -> None:
    memory = Path("/dev/shm")  # noqa: S108 - another filesystem is what is needed
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second filesystem here")
    original = memory / f"hybridize-test-{os.getpid()}"
    try:
        original.write_bytes(b"weights" * 1000)
        assert link_or_copy(original, tmp_path / "copied") == "copy"
        assert (tmp_path / "copied").read_bytes() == original.read_bytes()
        assert not (tmp_path / "copied").samefile(original)
    finally:
        original.unlink()


def test_an_existing_target_is_not_linked_over(tmp_path: Path) -> None:
    (tmp_path / "original").write_text("weights")
    (tmp_path / "kept").write_text("precious")
    with pytest.raises(FileExistsError):
        link_or_copy(tmp_path / "original", tmp_path / "kept")
    assert (tmp_path / "kept").read_text() == "precious"


def test_more_than_the_free_space_is_refused(tmp_path: Path) -> None:
    check_free_space(tmp_path, 0)
    with pytest.raises(OutputError, match="too little free space"):
        check_free_space(tmp_path, 1 << 60)


def test_an_output_is_absent_or_forced(tmp_path: Path) -> None:
    path, link = tmp_path / "out", tmp_path / "dangling"
    check_absent(path, force=False)
    path.mkdir()
    link.symlink_to("nowhere")
    check_absent(path, force=True)
    for existing in (path, link):
        with pytest.raises(OutputError, match="exists already"):
            check_absent(existing, force=False)
    with pytest.raises(OutputError, match="is a folder"):
        check_file_absent(path, force=True)
    with pytest.raises(OutputError, match="does not exist"):
        check_absent(tmp_path / "none" / "out", force=True)


def test_a_folder_is_built_beside_its_name_and_replaces_the_one_before(tmp_path: Path) -> None:
    final = tmp_path / "out"
    for text in ("old", "new"):
        with building(final) as partial:
            assert partial.parent == final.parent
            (partial / text).mkdir()
            (partial / text / "a").write_text(text)
            assert final.exists() == (text == "new")
            finish_folder(partial, final)
        assert (final / text / "a").read_text() == text
    assert (names(final), names(tmp_path)) == (["new"], ["out"])


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, OutputError])
def test_a_folder_that_fails_is_removed(kind: type[BaseException], tmp_path: Path) -> None:
    final = tmp_path / "out"
    final.mkdir()
    (final / "old").write_text("old")
    with pytest.raises(kind), building(final) as partial:
        (partial / "half").write_text("half")
        raise kind("stop")
    assert names(tmp_path) == ["out"]
    assert names(final) == ["old"]


def test_a_folder_that_is_not_renamed_stays_until_it_is_built_anew(tmp_path: Path) -> None:
    with building(tmp_path / "out") as partial:
        (partial / "half").write_text("half")
    assert names(tmp_path) == [partial.name]
    with building(tmp_path / "out") as partial:
        assert is_empty_folder(partial)
        finish_folder(partial, tmp_path / "out")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("there", "left"),
    [([".out.replaced"], [".out.replaced"]), ([".out.replaced", "out"], ["out"]), ([], [])],
    ids=["undone", "finished", "nothing to do"],
)
def test_an_interrupted_replacement_is_undone_or_finished(
    there: list[str], left: list[str], tmp_path: Path
) -> None:
    """The old folder had stepped aside; the new one had not come, or the old one had not gone."""
    for name in there:
        (tmp_path / name / name).mkdir(parents=True)
    restore_replaced(tmp_path / "out")
    assert names(tmp_path) == ["out"] * len(left)
    assert [names(path) for path in tmp_path.iterdir()] == [[name] for name in left]


def test_removing_a_link_leaves_what_it_points_at(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to("kept")
    for name in ("link", "never there"):
        remove(tmp_path / name)
    assert names(tmp_path) == ["kept"]
    remove(tmp_path / "kept")
    assert names(tmp_path) == []


def test_what_finished_work_kept_is_cleared(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    for name in ("a-1.jsonl", "a-1.jsonl.lock", "b.jsonl", "theirs.txt"):
        (work / name).write_text("")
    clear_files(work, ["a-*.jsonl", "b.jsonl", "never-there.jsonl"])
    assert names(work) == ["theirs.txt"]
    (work / "theirs.txt").unlink()
    for _ in range(2):
        clear_files(work, ["a-*.jsonl"])
        assert names(tmp_path) == []


def test_only_a_folder_can_be_an_empty_folder(tmp_path: Path) -> None:
    assert is_empty_folder(tmp_path)
    (tmp_path / "a").write_text("")
    assert not any(map(is_empty_folder, (tmp_path, tmp_path / "a", tmp_path / "none")))


@pytest.mark.parametrize(
    ("make", "said"), [(os.mkfifo, "a named pipe"), (os.mkdir, "a folder")], ids=["pipe", "folder"]
)
def test_what_is_no_file_is_refused_at_once(
    make: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    make(tmp_path / "x")
    with pytest.raises(PlanError) as error:
        open_file(tmp_path / "x", PlanError)
    assert error.value.details["got"] == said


def test_a_device_is_refused() -> None:
    with pytest.raises(PlanError) as error:
        read_file(Path("/dev/zero"), PlanError)
    assert error.value.details["got"] == "a device"


@pytest.mark.parametrize("text", ["1e400", "-1e999", "NaN", '"\\ud800"', '"\\udc00x"'])
def test_json_that_cannot_be_written_again_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(f'{{"a": [{text}]}}')
    with pytest.raises(PlanError, match="not valid JSON"):
        read_json_object(path, PlanError)


def test_a_whole_pair_of_surrogates_is_a_letter(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": "\\ud83d\\ude42", "b": -1.5e3}')
    assert read_json_object(path, PlanError) == {"a": "🙂", "b": -1500.0}
