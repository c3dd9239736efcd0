"""Calibration data on a Hub on loopback: one file, once, at a commit that the scores name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from converter.calibration.data import hub as hub_data
from converter.calibration.data.hub import local_path, pinned
from converter.calibration.data.sources import KINDS_OF_FILES, data_sets
from converter.common.errors import DataError
from tests.conftest import run_cli
from tests.loopback_hub import LoopbackHub
from tests.publish.conftest import hub

__all__ = ["hub"]

NAME = "owner/questions"


def rows(word: str, count: int = 40) -> bytes:
    """Rows whose prompts are longer than the window."""
    made = [{"prompt": f"{i} {word} " * 30, "answer": f"x{i}"} for i in range(count)]
    return "\n".join(json.dumps(row) for row in made).encode()


@pytest.fixture
def commit(hub: LoopbackHub) -> str:
    """The commit of a data set with two files of rows, and what else stands beside them."""
    files = {"data/train.jsonl": rows("train"), "data/test.jsonl": rows("test")}
    others = {"README.md": b"---\n---\n", "dataset_infos.json": b"{}", "make.py": b"1/0"}
    hub.create("owner/single", {"long.jsonl": rows("long"), **others})
    return hub.create(NAME, {**files, **others})


def complete(data: str, *, offline: bool = False) -> str:
    return pinned(data, KINDS_OF_FILES, offline=offline)


def test_a_set_is_named_by_commit_and_file_and_read_from_the_cache(
    hub: LoopbackHub, commit: str
) -> None:
    found = complete(f"hub:{NAME}/data/train.jsonl")
    assert found == f"hub:{NAME}@{commit}/data/train.jsonl"
    assert hub.asked("GET", "test.jsonl|make.py|README") == 0
    (data,) = data_sets(found)
    assert data.path.read_bytes() == rows("train")
    assert data.rows[3]["answer"] == "x3"
    hub.requests.clear()
    for asked in (f"hub:{NAME}/data/train.jsonl", f"hub:{NAME}", found):
        assert complete(asked, offline=True) == found
    assert hub.requests == []


def test_sets_stand_among_others_and_by_their_only_file(commit: str, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_bytes(rows("mine"))
    mine = tmp_path / "mine.jsonl"
    found = complete(f"a=hub:owner/single,b=hub:{NAME}@main/data/test.jsonl,{mine},recall")
    sets = data_sets(found)
    assert [one.name for one in sets] == ["a", "b", "mine", "recall"]
    assert sets[0].path.read_bytes() == rows("long")
    assert sets[1].source == f"hub:{NAME}@{commit}/data/test.jsonl"
    two = complete(f"hub:owner/single,hub:{NAME}/data/test.jsonl")
    assert [one.label for one in data_sets(two)] == ["long", "test"]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (f"hub:{NAME}", "several files"),
        (f"hub:{NAME}/data/none.jsonl", "data/test.jsonl, data/train.jsonl"),
        (f"hub:{NAME}/../../../etc/passwd", "no such file"),
        (f"hub:{NAME}@nowhere/data/test.jsonl", "no such revision"),
        ("hub:owner/nothing", "does not show such a repository"),
        ("hub:owner/empty", "no file of it can be read"),
    ],
)
@pytest.mark.usefixtures("commit")
def test_what_is_not_there_is_told(data: str, told: str, hub: LoopbackHub) -> None:
    hub.create("owner/empty", {"README.md": b"", "rows.csv": b"a,b"})
    with pytest.raises(DataError) as caught:
        complete(data)
    assert told in str(caught.value)


@pytest.mark.usefixtures("commit")
def test_without_the_network_only_what_was_downloaded_is_there() -> None:
    with pytest.raises(DataError, match="not in the local Hub cache") as caught:
        complete("hub:owner/single", offline=True)
    assert "once without --offline" in str(caught.value)
    with pytest.raises(DataError, match="has not been downloaded"):
        local_path(f"hub:{NAME}@main/data/train.jsonl")


@pytest.mark.usefixtures("commit")
def test_a_file_that_is_too_large_costs_no_download(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_data, "_LARGEST_BYTES", 1000)
    with pytest.raises(DataError, match="larger than any"):
        complete("hub:owner/single")
    assert hub.asked("GET", "resolve") == 0


def test_scores_name_the_commit_and_another_is_refused(
    hub: LoopbackHub,
    commit: str,
    sources: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, work = tmp_path / "scores.json", tmp_path / "work"
    asked = ("--data", f"hub:{NAME}/data/train.jsonl", "--samples", 3, "--validation", 1)
    settings = (*asked, "--window", 8, "--method", "nll-restore", "--work", work, "-q")
    command = ("calibrate", sources["qwen3"], "--out", out, *settings)
    assert run_cli(*command) == 0
    fingerprint: dict[str, Any] = json.loads(out.read_text())["fingerprint"]
    assert fingerprint["hub_data"] == [f"hub:{NAME}@{commit}/data/train.jsonl"]
    assert run_cli(*command, "--offline", "--force") == 0
    hub.create(NAME, {"data/train.jsonl": rows("other")})
    shutil.rmtree(tmp_path / "cache")
    capsys.readouterr()
    assert run_cli(*command, "--force") == 2
    assert "data" in capsys.readouterr().err
