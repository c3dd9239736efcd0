"""A sample of the faults of docs/faults.md, repeated: each leaves the old or the new, whole."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import faults, push_faults
from tests.fault_table import PUSH, Row, disk_rows, documented, push_rows, source_of
from tests.ggufs import hybrid_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# Every fault is tried at every EVERY-th point, or at more where there are few; `python -m
# tests.faults` tries all.
EVERY = 8
FEW = {"export": 2}
WHOLE = {"nothing", "nothing new", "the old one", "the old one, aside", "the new one"}


def hold(rows: list[Row], least: int) -> None:
    assert len(rows) >= least
    for row in rows:
        *_, status, left, again, then = row
        assert left in WHOLE, row
        assert (again, then) == (0, "the new one"), row
        assert status in (-9, 2) or (status == 0 and left == "the new one"), row
    unknown = set(rows) - documented()
    assert not unknown, f"run: python -m tests.faults, for {unknown}"


@pytest.mark.parametrize("command", faults.CASES)
def test_a_command_that_fails_anywhere_leaves_the_old_or_the_new(
    command: str, sources: dict[str, Path], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    old = checkpoint("qwen2", "plain", (0, 3))
    places = {**sources, "checkpoint": tmp_path / "qwen3-hybrid"}
    if source_of(command) == "checkpoint":
        hybrid_of(tmp_path, "qwen3")
    source = places[source_of(command)]
    outcomes = faults.run_sweep(command, source, old, tmp_path / "work", FEW.get(command, EVERY))
    hold(disk_rows(command, outcomes), 5)
    assert {tuple(outcome.others) for outcome in outcomes} == {()}, "something was left lying about"


def test_a_push_that_fails_anywhere_leaves_the_old_or_the_new(
    checkpoint: Callable[..., Path],
) -> None:
    outcomes = push_faults.run_push_sweep(checkpoint("qwen2", "plain", (0, 3)), EVERY)
    hold(push_rows(outcomes), 5)


def test_the_table_is_about_every_command() -> None:
    rows = documented()
    assert {row[0] for row in rows} == {*faults.CASES, PUSH}
    assert {row[2] for row in rows} == {f.name for f in faults.FAULTS} | set(push_faults.FAULTS)
    assert {row[4] for row in rows} <= WHOLE
    assert {(row[5], row[6]) for row in rows} == {(0, "the new one")}
