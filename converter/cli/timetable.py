"""Which stage of a measurement is under way, and how long all of them will take here."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from converter.cli.console import Console
from converter.common.progress import Bar, Stage
from converter.common.units import human_time

# The pace of less than this may be that of warming up.
_MEASURED_SECONDS = 3.0


@dataclass
class Timetable:
    """Numbers the stages of a run, and tells its time from the pace of the first pieces."""

    console: Console
    _stages: list[Stage] = field(default_factory=list)
    _place: int = 0
    _pace: float | None = None

    def announce(self, stages: Sequence[Stage]) -> None:
        """These are the stages to come."""
        self._stages, self._place, self._pace = list(stages), 0, None

    @contextmanager
    def progress(self, title: str, amount: float) -> Iterator[Bar]:
        """A bar for one stage; of a stage that was announced, its number and its time, too."""
        place = next((i for i, s in enumerate(self._stages) if s.title == title), None)
        if place is None:
            with self.console.progress(title, amount) as bar:
                yield bar
            return
        self._place, started = place, time.monotonic()
        several = len(self._stages) > 1
        name = f"stage {place + 1} of {len(self._stages)}, {title}" if several else title
        with self.console.progress(name, amount, transient=True) as bar:
            paced = _PacedBar(self, bar, amount)
            yield paced
        self._pace = paced.pace or self._pace
        left = self._time_of(place + 1)
        more = f"; at most about {left} left" if left and place + 1 < len(self._stages) else ""
        self.console.say(f"{name}: {human_time(time.monotonic() - started)}{more}")

    def measured(self, pace: float, left: float) -> None:
        """The first pieces went at this pace, and so much of their stage is left."""
        if self._pace is None and self._stages:
            self._pace = pace
            count = len(self._stages)
            self.console.say(
                (f"{count} stages, " if count > 1 else "")
                + f"at most about {self._time_of(self._place + 1, left)} in all at the pace of the "
                "first pieces"
            )

    def _time_of(self, first: int, more: float = 0.0) -> str | None:
        """How long the stages from one on take, and so many layer-forwards more."""
        if self._pace is None:
            return None
        work = more + sum(stage.layer_forwards for stage in self._stages[first:])
        return human_time(work / self._pace)


@dataclass
class _PacedBar:
    """A bar that notes its pace, in layer-forwards a second, once that says something."""

    _timetable: Timetable
    _bar: Bar
    _left: float
    pace: float | None = None
    _done: float = 0.0
    _since: float | None = None

    def advance(self, amount: float) -> None:
        """So much more has been done."""
        self._bar.advance(amount)
        self._left -= amount
        now = time.monotonic()
        if self._since is None:
            # Before the first piece is done the model may have been loaded.
            self._since = now
            return
        self._done += amount
        if now - self._since >= _MEASURED_SECONDS:
            self.pace = self._done / (now - self._since)
            self._timetable.measured(self.pace, max(0.0, self._left))

    def expect(self, amount: float) -> None:
        """So much is still to do."""
        self._bar.expect(amount)
        self._left = amount
