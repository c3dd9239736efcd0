"""What is found is kept, whoever found it; a killed run is continued, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converter.calibration.cache import (
    Record,
    ResultCache,
    check_settings,
    open_cache,
    open_log,
)
from converter.calibration.distributed import ALONE, Processes
from converter.common.errors import OutputError, ScoresError

WORK = {"source": "abc"}
NAMES = [f"piece {number}" for number in range(5)]


class Alone(Processes):
    """One of several processes, in which the others never say anything."""

    from_leader = staticmethod(ALONE.from_leader)
    everyones = staticmethod(ALONE.everyones)


class Finder:
    """Finds results, and notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, names: Sequence[str]) -> list[Record]:
        """As `ResultCache.fill` wants it."""
        self.asked.append(list(names))
        return [{"length": len(name), "of": name} for name in names]


@contextmanager
def opened(
    folder: Path, work: Mapping[str, Any] = WORK, processes: Processes = ALONE, fresh: bool = False
) -> Iterator[ResultCache]:
    with open_cache(folder, "scores", work, processes, fresh=fresh) as cache:
        yield cache


def fill(folder: Path, finder: Finder, names: Sequence[str] = NAMES) -> list[Record]:
    with opened(folder) as cache:
        return cache.fill(names, 2, finder)


def test_results_are_found_in_groups_and_given_in_order(tmp_path: Path) -> None:
    finder = Finder()
    records = fill(tmp_path, finder)
    assert [record["of"] for record in records] == [record["name"] for record in records] == NAMES
    assert all(record["seconds"] >= 0 for record in records)
    assert finder.asked == [NAMES[:2], NAMES[2:4], NAMES[4:]]


def test_what_was_found_is_not_looked_for_again(tmp_path: Path) -> None:
    first, second = Finder(), Finder()
    found = fill(tmp_path, first, NAMES[1:4])
    with opened(tmp_path) as cache:
        assert cache.found_earlier == 3
        assert list(cache.missing(NAMES)) == [NAMES[0], NAMES[4]]
        records = cache.fill(NAMES, 10, second)
        assert list(cache.missing(NAMES)) == []
        assert cache.seconds == pytest.approx(sum(record["seconds"] for record in records))
    assert second.asked == [[NAMES[0], NAMES[4]]]
    # Other titles have logs of their own.
    with open_cache(tmp_path, "quality-1", {"other": 1}, ALONE, fresh=False) as cache:
        assert cache.found_earlier == 0
    # Even the time of the earlier run is kept.
    assert records[1:4] == found


def test_a_group_is_on_disk_before_the_next_is_looked_for(tmp_path: Path) -> None:
    class Stop(Exception):  # noqa: N818 - stands for a kill
        pass

    calls: list[int] = []

    def find(names: Sequence[str]) -> list[Record]:
        calls.append(len(names))
        if len(calls) == 2:
            lines = (tmp_path / "scores.jsonl").read_text().splitlines()[1:]
            assert [json.loads(line)["name"] for line in lines] == NAMES[:2]
            raise Stop
        return [{} for _ in names]

    with pytest.raises(Stop), opened(tmp_path) as cache:
        cache.fill(NAMES, 2, find)
    finder = Finder()
    fill(tmp_path, finder)
    assert finder.asked == [NAMES[2:4], NAMES[4:]]


@pytest.mark.parametrize("count", [2, 3])
def test_every_result_is_one_processes_own(count: int) -> None:
    shares = [list(Processes(rank, count, 0).share(NAMES)) for rank in range(count)]
    assert sorted(name for share in shares for name in share) == NAMES
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def write_of_rank(folder: Path, rank: int, names: Sequence[str]) -> None:
    """What one of two processes leaves behind when the others die."""
    with opened(folder, WORK, Alone(rank, 2, 0)) as cache:
        # Its share of these is all of them.
        cache._processes = ALONE
        cache.fill(names, 1, Finder())


def test_logs_of_other_ranks_are_read(tmp_path: Path) -> None:
    write_of_rank(tmp_path, 1, [NAMES[1], NAMES[3]])
    write_of_rank(tmp_path, 0, [NAMES[0]])
    logs = {path.name for path in tmp_path.glob("*.jsonl")}
    assert logs == {"scores.jsonl", "scores.rank1.jsonl"}
    finder = Finder()
    records = fill(tmp_path, finder)
    assert [record["of"] for record in records] == NAMES
    assert finder.asked == [[NAMES[2], NAMES[4]]]


def test_fresh_forgets_the_logs_of_all_ranks(tmp_path: Path) -> None:
    write_of_rank(tmp_path, 1, NAMES[1:2])
    write_of_rank(tmp_path, 0, NAMES[:1])
    with opened(tmp_path, {"source": "other"}, fresh=True) as cache:
        assert cache.found_earlier == 0
        assert list(cache.missing(NAMES)) == NAMES
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["scores.jsonl"]


@pytest.mark.parametrize("rank", [0, 1])
def test_logs_of_other_work_are_refused(rank: int, tmp_path: Path) -> None:
    write_of_rank(tmp_path, rank, NAMES[:1])
    with pytest.raises(ScoresError, match="the model is another one"):
        opened(tmp_path, {"source": "other"}).__enter__()


@pytest.mark.parametrize("record", [{"seconds": 1.0}, {"name": "piece 0"}], ids=str)
@pytest.mark.parametrize("name", ["scores.jsonl", "scores.rank1.jsonl"])
def test_records_without_a_name_are_refused(
    name: str, record: dict[str, Any], tmp_path: Path
) -> None:
    """Such as those of logs that an earlier version of the tool wrote."""
    lines = [{"journal": 2, "settings": WORK}, record]
    (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ScoresError, match="damaged") as caught:
        opened(tmp_path).__enter__()
    assert caught.value.details["where"] == str(tmp_path / name)


def test_everyone_knows_what_anyone_found(tmp_path: Path) -> None:
    """With the other process's part handed in as if it had just been exchanged."""

    class Pair(Alone):
        def everyones(self, value: Any) -> list[Any]:  # type: ignore[override]
            """Its own part, and one that the other found."""
            other = {NAMES[1]: {"name": NAMES[1], "of": "the other's", "seconds": 1.0}}
            return [value, other if value else {}]

    with opened(tmp_path, WORK, Pair(0, 2, 0)) as cache:
        finder = Finder()
        records = cache.fill(NAMES[:2], 1, finder)
    assert finder.asked == [[NAMES[0]]]
    assert [record["of"] for record in records] == [NAMES[0], "the other's"]


# --- the log of one process -------------------------------------------------------------------

MASKED = {"source": "abc", "window": 8}
HEAD = json.dumps({"journal": 2, "settings": MASKED}).encode()


def write(path: Path, *records: dict[str, Any], fresh: bool = False) -> list[dict[str, Any]]:
    with open_log(path, MASKED, fresh=fresh) as log:
        for record in records:
            log.append(record)
        return [dict(record) for record in log.records]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "work" / "scores.jsonl"


def test_a_new_log_makes_its_folder_and_takes_numbers_only(path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write(path, {"loss": float("nan")})
    assert write(path) == []
    assert json.loads(path.read_text()) == {"journal": 2, "settings": MASKED}


def test_records_come_back_in_order_and_are_on_disk_at_once(path: Path) -> None:
    write(path, {"n": 1}, {"n": 2})
    with open_log(path, MASKED, fresh=False) as log:
        log.append({"n": 3})
        assert json.loads(path.read_text().splitlines()[-1]) == {"n": 3}
    assert write(path) == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_a_failure_of_the_work_keeps_the_records_and_stays_what_it_was(path: Path) -> None:
    with pytest.raises(FileNotFoundError), open_log(path, MASKED, fresh=False) as log:
        log.append({"n": 1})
        raise FileNotFoundError("a file of the work's own")
    assert write(path) == [{"n": 1}]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(1, 200))
def test_a_log_cut_anywhere_is_continued_from_its_last_whole_line(path: Path, cut: int) -> None:
    write(path, *({"n": n, "text": "é\n"} for n in range(5)), fresh=True)
    left = path.read_bytes()[:-cut]
    path.write_bytes(left)
    kept = write(path, {"n": 99})
    assert [record["n"] for record in kept] == list(range(max(left.count(b"\n") - 1, 0)))
    assert write(path)[-1] == {"n": 99}


def test_fresh_forgets(path: Path) -> None:
    write(path, {"n": 1})
    assert write(path, {"n": 2}, fresh=True) == []
    assert write(path) == [{"n": 2}]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (MASKED | {"source": "xyz"}, "the model is another one"),
        (MASKED | {"weights": {"a": "b"}}, "the weights have other bytes"),
        (MASKED | {"window": 9}, "window was 8, now 9"),
        ({"source": "abc"}, "window was 8, now unknown"),
        (MASKED | {"dtype": "float32"}, "dtype was unknown, now float32"),
        ({"source": "xyz", "window": 9}, "the model is another one; window was 8, now 9"),
    ],
    ids=str,
)
def test_other_work_is_not_continued(path: Path, other: dict[str, Any], said: str) -> None:
    write(path, {"n": 1})
    before = path.read_bytes()
    with pytest.raises(ScoresError, match=rf"{said}\n") as caught:
        open_log(path, other, fresh=False).__enter__()
    assert "--fresh" in caught.value.details["next step"]
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        b"nonsense\n",
        b"\xff\xfe\n",
        b"[]\n",
        b"{}\n",
        b'{"journal": "2", "settings": {}}\n',
        b'{"journal": 2}\n',
        b'{"journal": 2, "settings": []}\n',
        HEAD + b"\n3\n",
        HEAD + b'\n{"n": 1\n{"n": 2}\n',
    ],
)
def test_a_damaged_log_is_refused_until_it_is_thrown_away(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ScoresError, match="damaged") as caught:
        write(path)
    assert "--fresh" in caught.value.details["next step"]
    assert path.read_bytes() == content
    assert write(path, {"n": 1}, fresh=True) == []


def test_a_log_of_another_version_is_refused_as_such(path: Path) -> None:
    path.parent.mkdir()
    path.write_text('{"journal": 1, "fingerprint": {}}\n')
    with pytest.raises(ScoresError, match="of another version of hybridize"):
        write(path)


def test_two_processes_do_not_share_a_log(path: Path) -> None:
    with open_log(path, MASKED, fresh=False) as log:
        log.append({"n": 1})
        with pytest.raises(OutputError, match="another process"):
            open_log(path, MASKED, fresh=True).__enter__()
        log.append({"n": 2})
    assert write(path) == [{"n": 1}, {"n": 2}]


def test_a_log_that_cannot_be_opened_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "scores.jsonl", tmp_path / "folder"):
        with pytest.raises(OutputError, match="cannot be written"):
            write(path)


def test_equal_settings_are_accepted_and_long_ones_are_cut_in_messages(path: Path) -> None:
    check_settings(path, MASKED, dict(reversed(MASKED.items())))
    with pytest.raises(ScoresError, match=f"data was {'x' * 80}, now y\n"):
        check_settings(path, {"data": "x" * 500}, {"data": "y"})
