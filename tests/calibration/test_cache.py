"""Notebooks: what is found is kept, whoever found it, and nothing is found twice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from converter.calibration.cache import Record, ResultCache, open_cache
from converter.calibration.distributed import ALONE, Processes
from converter.common.errors import OutputError, ScoresError

WORK = {"source": "abc"}
NAMES = [f"piece {number}" for number in range(5)]


class Alone(Processes):
    """One of several processes, in which the others never say anything."""

    def from_leader(self, value: Any) -> Any:
        """What it said itself."""
        return value

    def everyones(self, value: Any) -> list[Any]:
        """What it said itself."""
        return [value]


class Finder:
    """Finds pieces, and notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, names: Sequence[str]) -> list[Record]:
        """As `ResultCache.fill` wants it."""
        self.asked.append(list(names))
        return [{"length": len(name), "of": name} for name in names]


def fill(folder: Path, finder: Finder, names: Sequence[str] = NAMES) -> list[Record]:
    with open_cache(folder, "scores", WORK, ALONE, fresh=False) as cache:
        return cache.fill(names, 2, finder)


def test_pieces_are_found_in_groups_and_given_in_order(tmp_path: Path) -> None:
    finder = Finder()
    records = fill(tmp_path, finder)
    assert [record["of"] for record in records] == [record["name"] for record in records] == NAMES
    assert all(record["seconds"] >= 0 for record in records)
    assert finder.asked == [NAMES[:2], NAMES[2:4], NAMES[4:]]


def test_what_was_found_is_not_looked_for_again(tmp_path: Path) -> None:
    first, second = Finder(), Finder()
    found = fill(tmp_path, first, NAMES[1:4])
    with open_cache(tmp_path, "scores", WORK, ALONE, fresh=False) as cache:
        assert cache.found_earlier == 3
        assert list(cache.missing(NAMES)) == [NAMES[0], NAMES[4]]
        records = cache.fill(NAMES, 10, second)
        assert list(cache.missing(NAMES)) == []
        assert cache.seconds == pytest.approx(sum(record["seconds"] for record in records))
    assert second.asked == [[NAMES[0], NAMES[4]]]
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

    with (
        pytest.raises(Stop),
        open_cache(tmp_path, "scores", WORK, ALONE, fresh=False) as cache,
    ):
        cache.fill(NAMES, 2, find)
    finder = Finder()
    fill(tmp_path, finder)
    assert finder.asked == [NAMES[2:4], NAMES[4:]]


@pytest.mark.parametrize("count", [2, 3])
def test_every_piece_is_one_processes_own(count: int) -> None:
    shares = [list(Processes(rank, count, 0).share(NAMES)) for rank in range(count)]
    assert sorted(name for share in shares for name in share) == NAMES
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def write_of_rank(folder: Path, rank: int, names: Sequence[str]) -> None:
    """What one of two processes leaves behind when the others die."""
    with open_cache(folder, "scores", WORK, Alone(rank, 2, 0), fresh=False) as cache:
        # Its share of these is all of them.
        cache._processes = ALONE
        cache.fill(names, 1, Finder())


def test_journals_of_other_ranks_are_read(tmp_path: Path) -> None:
    write_of_rank(tmp_path, 1, [NAMES[1], NAMES[3]])
    write_of_rank(tmp_path, 0, [NAMES[0]])
    assert {path.name for path in tmp_path.glob("*.jsonl")} == {
        "scores.jsonl",
        "scores.rank1.jsonl",
    }
    finder = Finder()
    records = fill(tmp_path, finder)
    assert [record["of"] for record in records] == NAMES
    assert finder.asked == [[NAMES[2], NAMES[4]]]


def test_fresh_forgets_the_journals_of_all_ranks(tmp_path: Path) -> None:
    write_of_rank(tmp_path, 1, NAMES[1:2])
    write_of_rank(tmp_path, 0, NAMES[:1])
    with open_cache(tmp_path, "scores", {"source": "other"}, ALONE, fresh=True) as cache:
        assert cache.found_earlier == 0
        assert list(cache.missing(NAMES)) == NAMES
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["scores.jsonl"]


@pytest.mark.parametrize("rank", [0, 1])
def test_journals_of_other_work_are_refused(rank: int, tmp_path: Path) -> None:
    write_of_rank(tmp_path, rank, NAMES[:1])
    with (
        pytest.raises(ScoresError, match="the source differs"),
        open_cache(tmp_path, "scores", {"source": "other"}, ALONE, fresh=False),
    ):
        pass


@pytest.mark.parametrize("record", [{"seconds": 1.0}, {"name": "piece 0"}], ids=str)
@pytest.mark.parametrize("name", ["scores.jsonl", "scores.rank1.jsonl"])
def test_records_without_a_name_are_refused(
    name: str, record: dict[str, Any], tmp_path: Path
) -> None:
    """Such as those of journals that an earlier version of the tool wrote."""
    lines = [{"journal": 1, "fingerprint": WORK}, record]
    (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with (
        pytest.raises(ScoresError, match="damaged") as caught,
        open_cache(tmp_path, "scores", WORK, ALONE, fresh=False),
    ):
        pass
    assert caught.value.details["where"] == str(tmp_path / name)


def test_titles_do_not_share_journals(tmp_path: Path) -> None:
    fill(tmp_path, Finder())
    with open_cache(tmp_path, "quality-1", {"other": 1}, ALONE, fresh=False) as cache:
        assert cache.found_earlier == 0


def test_a_journal_that_is_held_is_not_shared(tmp_path: Path) -> None:
    with (
        open_cache(tmp_path, "scores", WORK, ALONE, fresh=False),
        pytest.raises(OutputError, match="another process is doing this work"),
        open_cache(tmp_path, "scores", WORK, ALONE, fresh=False),
    ):
        pass


def test_everyone_knows_what_anyone_found(tmp_path: Path) -> None:
    """With the other process's part handed in as if it had just been exchanged."""

    class Pair(Alone):
        def everyones(self, value: Any) -> list[Any]:
            """Its own part, and one that the other found."""
            other = {NAMES[1]: {"name": NAMES[1], "of": "the other's", "seconds": 1.0}}
            return [value, other if value else {}]

    with open_cache(tmp_path, "scores", WORK, Pair(0, 2, 0), fresh=False) as cache:
        assert isinstance(cache, ResultCache)
        finder = Finder()
        records = cache.fill(NAMES[:2], 1, finder)
    assert finder.asked == [[NAMES[0]]]
    assert [record["of"] for record in records] == [NAMES[0], "the other's"]
