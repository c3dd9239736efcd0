"""Stages are numbered, and their time is told from the pace of the first pieces."""

from __future__ import annotations

import pytest

from converter.cli.console import Console
from converter.cli.timetable import Timetable
from converter.common.progress import Stage

Captured = pytest.CaptureFixture[str]


class Clock:
    """Goes on when it is told."""

    now = 100.0

    def monotonic(self) -> float:
        """As `time.monotonic`."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("converter.cli.timetable.time", clock)
    return clock


def test_the_whole_time_is_told_once_a_few_seconds_are_measured(
    clock: Clock, capsys: Captured
) -> None:
    timetable = Timetable(Console(False, 0))
    timetable.announce([Stage("search", 100.0), Stage("validation", 50.0), Stage("quality", 30.0)])
    with timetable.progress("search", 100.0) as bar:
        # Loading the model is no part of the pace.
        clock.now += 60
        bar.advance(10)
        clock.now += 2
        bar.advance(5)
        assert "stages" not in capsys.readouterr().err
        clock.now += 2
        bar.advance(5)
        # 10 in 4 seconds; of 80 + 50 + 30 all is left.
        assert "3 stages, at most about 64 seconds in all at the pace" in capsys.readouterr().err
        clock.now += 4
        bar.expect(0.0)
        bar.advance(30)
        assert "stages" not in capsys.readouterr().err
    # 40 in 8 seconds.
    told = "stage 1 of 3, search: 68 seconds; at most about 16 seconds left\n"
    assert told in capsys.readouterr().err
    for title, place in (("validation", 2), ("quality", 3)):
        with timetable.progress(title, 1.0) as bar:
            clock.now += 1
            bar.advance(1.0)
        assert f"stage {place} of 3, {title}: 1 second" in capsys.readouterr().err


def test_a_bar_that_was_not_announced_has_its_title_only(capsys: Captured) -> None:
    with Timetable(Console(False, 0)).progress("controls", 1.0) as bar:
        bar.advance(1.0)
    told = capsys.readouterr().err
    assert "controls" in told and "stage" not in told


def test_a_quiet_run_tells_no_time(capsys: Captured) -> None:
    timetable = Timetable(Console(False, -1))
    timetable.announce([Stage("scores", 1.0)])
    with timetable.progress("scores", 1.0) as bar:
        bar.advance(1.0)
    assert capsys.readouterr().err == ""
