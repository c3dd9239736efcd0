"""The journal: what a killed run leaves is continued, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converter.calibration.log import check_fingerprint, open_log
from converter.common.errors import OutputError, ScoresError

WORK = {"source": "abc", "mask": {"window_tokens": 8}}


def write(path: Path, *records: dict[str, Any], fresh: bool = False) -> list[dict[str, Any]]:
    """Append records; what was there before."""
    with open_log(path, WORK, fresh=fresh) as log:
        for record in records:
            log.append(record)
        return [dict(record) for record in log.records]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "work" / "scores.jsonl"


def test_a_new_journal_is_empty_and_makes_its_folder(path: Path) -> None:
    assert write(path) == []
    assert json.loads(path.read_text()) == {"journal": 1, "fingerprint": WORK}


def test_records_come_back_in_order(path: Path) -> None:
    write(path, {"n": 1}, {"n": 2})
    write(path, {"n": 3})
    assert write(path) == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_a_record_is_on_disk_when_append_returns(path: Path) -> None:
    with open_log(path, WORK, fresh=False) as log:
        log.append({"n": 1})
        assert json.loads(path.read_text().splitlines()[-1]) == {"n": 1}


def test_a_failure_of_the_work_keeps_the_records_and_stays_what_it_was(path: Path) -> None:
    with pytest.raises(FileNotFoundError), open_log(path, WORK, fresh=False) as log:
        log.append({"n": 1})
        raise FileNotFoundError("a file of the work's own")
    assert write(path) == [{"n": 1}]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(1, 200))
def test_a_journal_cut_anywhere_is_continued_from_its_last_whole_line(path: Path, cut: int) -> None:
    write(path, *({"n": n, "text": "é\n"} for n in range(5)), fresh=True)
    whole = path.read_bytes()
    path.write_bytes(whole[: max(len(whole) - cut, 0)])
    kept = write(path, {"n": 99})
    assert [record["n"] for record in kept] == list(range(len(kept)))
    lines_left = whole[: max(len(whole) - cut, 0)].count(b"\n")
    assert len(kept) == max(lines_left - 1, 0)
    assert write(path)[-1] == {"n": 99}


def test_fresh_forgets(path: Path) -> None:
    write(path, {"n": 1})
    assert write(path, {"n": 2}, fresh=True) == []
    assert write(path) == [{"n": 2}]


@pytest.mark.parametrize(
    ("other", "field"),
    [
        ({"source": "xyz", "mask": {"window_tokens": 8}}, "source"),
        ({"source": "abc", "mask": {"window_tokens": 9}}, "mask"),
        ({"source": "abc"}, "mask"),
        (WORK | {"dtype": "float32"}, "dtype"),
    ],
    ids=str,
)
def test_other_work_is_not_continued(path: Path, other: dict[str, Any], field: str) -> None:
    write(path, {"n": 1})
    before = path.read_bytes()
    with (
        pytest.raises(ScoresError, match=f"the {field} differs") as caught,
        open_log(path, other, fresh=False),
    ):
        pass
    assert "--fresh" in caught.value.details["next step"]
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        b"nonsense\n",
        b"\xff\xfe\n",
        b"[]\n",
        b"{}\n",
        b'{"journal": 2, "fingerprint": {}}\n',
        b'{"journal": 1}\n',
        b'{"journal": 1, "fingerprint": []}\n',
        json.dumps({"journal": 1, "fingerprint": WORK}).encode() + b"\n3\n",
        json.dumps({"journal": 1, "fingerprint": WORK}).encode() + b'\n{"n": 1\n{"n": 2}\n',
    ],
)
def test_a_damaged_journal_is_refused_until_it_is_thrown_away(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ScoresError, match="damaged") as caught:
        write(path)
    assert "--fresh" in caught.value.details["next step"]
    assert path.read_bytes() == content
    assert write(path, {"n": 1}, fresh=True) == []


def test_two_processes_do_not_share_a_journal(path: Path) -> None:
    with open_log(path, WORK, fresh=False) as log:
        log.append({"n": 1})
        with (
            pytest.raises(OutputError, match="another process"),
            open_log(path, WORK, fresh=True),
        ):
            pass
        log.append({"n": 2})
    assert write(path) == [{"n": 1}, {"n": 2}]


def test_a_journal_that_cannot_be_opened_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "scores.jsonl", tmp_path / "folder"):
        with pytest.raises(OutputError, match="cannot be written"):
            write(path)


def test_what_is_no_number_is_not_kept(path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write(path, {"loss": float("nan")})
    assert write(path) == []


def test_equal_fingerprints_are_accepted_and_long_ones_are_cut_in_messages(path: Path) -> None:
    check_fingerprint(path, WORK, dict(reversed(WORK.items())))
    with pytest.raises(ScoresError) as caught:
        check_fingerprint(path, {"data": "x" * 500}, {"data": "y"})
    assert len(caught.value.details["got"]) == 80
