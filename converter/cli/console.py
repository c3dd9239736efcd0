"""All that the program prints: results on stdout, talk and progress on stderr."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from rich.table import Table


# Columns of a page that is no terminal.
_UNFOLDED = 1000
# A log file gets a line so soon, and each further one after twice the time.
_LOGGED_SECONDS = 15.0


@dataclass
class ProgressBar:
    """A bar that has been opened."""

    _shown: Progress
    _task: TaskID
    _logged_at: float = field(default_factory=time.monotonic)
    _pause: float = _LOGGED_SECONDS

    def advance(self, amount: float) -> None:
        """So much more has been done."""
        self._shown.advance(self._task, amount)
        quiet = self._shown.disable or self._shown.console.is_terminal
        if not quiet and time.monotonic() - self._logged_at >= self._pause:
            self._logged_at = time.monotonic()
            self._pause *= 2
            self._shown.console.print(self._shown.get_renderable())

    def expect(self, amount: float) -> None:
        """So much is still to do."""
        done = self._shown.tasks[0].completed
        self._shown.update(self._task, total=done + amount)


@dataclass(frozen=True)
class Console:
    """Where a command's words go.

    Attributes:
        json_output: print the result as one JSON object instead of tables.
        verbosity: -1 quiet, 0 normal, 1 verbose.
    """

    json_output: bool
    verbosity: int

    def result(self, value: Mapping[str, Any], show: Callable[[], None]) -> None:
        """Print a command's result: the JSON object, or what `show` prints."""
        if self.json_output:
            print(json.dumps(value, ensure_ascii=False, allow_nan=False))  # noqa: T201
        else:
            show()

    def say(self, text: str) -> None:
        """Tell the user what is going on, on stderr."""
        if self.verbosity >= 0:
            print(_folded(text, sys.stderr), file=sys.stderr, flush=True)  # noqa: T201

    def warn(self, text: str) -> None:
        """Tell the user on stderr, in colour, what may spoil the result."""
        if self.verbosity >= 0:
            from rich.console import Console as RichConsole

            shown = RichConsole(stderr=True, markup=False, highlight=False, emoji=False)
            shown.print(_folded(text, sys.stderr), style="yellow", soft_wrap=True)

    def print(self, text: str = "") -> None:
        """Print a line of a result."""
        print(_folded(text, sys.stdout))  # noqa: T201

    def stream(self, piece: str) -> None:
        """Print a piece of text as it comes."""
        print(piece, end="", flush=True)  # noqa: T201

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Print names and values of a result, one pair a line."""
        width = max(len(name) for name, _ in pairs)
        for name, value in pairs:
            self.print(f"  {name:<{width}}  {value}")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table of a result, every digit of it; columns of numbers are aligned right.

        Where the terminal is too narrow for it, every row becomes a block of lines.
        """
        from rich import box
        from rich.cells import cell_len
        from rich.console import Console as RichConsole
        from rich.table import Table

        table: Table = Table(box=box.SIMPLE_HEAD)
        cells = [[str(cell) for cell in row] for row in rows]
        for index, column in enumerate(columns):
            numeric = bool(cells) and all(row[index][:1] in "-0123456789" for row in cells)
            table.add_column(
                column,
                justify="right" if numeric else "left",
                # Words may go to the next line, in cells and in titles; a number may not be cut.
                min_width=max(cell_len(row[index]) for row in cells) if numeric else None,
                overflow="fold",
            )
        for row in cells:
            table.add_row(*row)
        # Nobody folds what goes into a file.
        width = None if sys.stdout.isatty() else _UNFOLDED
        console = RichConsole(width=width, highlight=False, markup=False, emoji=False)
        wide = console.options.update(width=_UNFOLDED)
        if console.measure(table, options=wide).minimum <= console.width:
            console.print(table)
            return
        for first, *others in cells:
            self.print(f"\n{columns[0]} {first}".rstrip())
            self.pairs(list(zip(columns[1:], others, strict=True)))
        self.print()

    @contextmanager
    def progress(
        self, title: str, amount: float, *, transient: bool = False
    ) -> Iterator[ProgressBar]:
        """A bar on stderr that estimates the remaining time.

        Args:
            title: what is being done.
            amount: how much of it there is, in whatever `ProgressBar.advance` counts.
            transient: take the bar away when it is done.
        """
        from rich.console import Console as RichConsole
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        with Progress(
            *columns,
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=RichConsole(file=sys.stderr),
            disable=self.verbosity < 0,
            redirect_stdout=False,
            transient=transient,
        ) as shown:
            yield ProgressBar(shown, shown.add_task(title, total=amount))

    def start_logging(self) -> None:
        """Send the package's log records to stderr when asked to be verbose."""
        logging.basicConfig(
            stream=sys.stderr,
            level=logging.INFO if self.verbosity > 0 else logging.WARNING,
            format="%(name)s: %(message)s",
        )


def _folded(text: str, stream: TextIO) -> str:
    """A text with whole words on every line of a terminal; lines with a margin stay as they are."""
    if not stream.isatty():
        return text
    fill = textwrap.TextWrapper(
        shutil.get_terminal_size().columns, break_long_words=False, break_on_hyphens=False
    ).fill
    return "\n".join(line if line[:1] in ("", " ") else fill(line) for line in text.split("\n"))
