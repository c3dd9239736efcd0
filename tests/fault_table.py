"""The table of docs/faults.md, from every fault at every point of every command."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tests import faults
from tests.conftest import make_model, run_cli
from tests.ggufs import hybrid_of

PAGE = Path(__file__).parent.parent / "docs" / "faults.md"
BEGIN, END = "<!-- table: python -m tests.faults -->\n", "<!-- end of table -->\n"
PUSH = "push"
# What may be left, in the order in which a command goes through it.
WHOLE = ("nothing", "nothing new", "the old one", "the old one, aside", "the new one")
# (command, point, fault, exit status, what was left, exit status again, what is there then)
Row = tuple[str, str, str, int, str, int, str]


def rows_of(command: str, places: dict[str, Path], work: Path, every: int) -> list[Row]:
    """Rows of a sweep over a command, or a push; `places` are those of `make_places`."""
    if command == PUSH:
        outcomes = faults.run_sweep("tests.push_faults", places["old"], every)
    else:
        source = places[{"calibrate": "qwen3", "export": "checkpoint"}.get(command, "qwen2")]
        outcomes = faults.run_sweep("tests.faults", command, source, places["old"], work, every)
    rows = [(command, *outcome) for outcome in outcomes]
    hold(rows)
    return rows


def make_places(root: Path) -> dict[str, Path]:
    """The models, and a finished checkpoint by another plan."""
    places = {
        "qwen2": make_model(root / "qwen2", "qwen2", shards=True),
        "qwen3": make_model(root / "qwen3", "qwen3"),
        "checkpoint": hybrid_of(root, "qwen3"),
        "old": root / "old",
    }
    options = ("--layers", "0,3", "--window", "24", "-q")
    assert run_cli("convert", places["qwen2"], places["old"], *options) == 0
    return places


def hold(rows: list[Row]) -> None:
    """Each fault leaves the old or the new, whole, and the same command again gets it done.

    A command that is killed later is never further back.
    """
    for row in rows:
        *_, status, left, again, then = row
        assert left in WHOLE, row
        assert (again, then) == (0, "the new one"), row
        assert status in (-9, 2) or (status == 0 and left == "the new one"), row
    reached = [WHOLE.index(row[4]) for row in rows if row[2] == faults.KILL]
    assert reached == sorted(reached), rows


def render(rows: Iterable[Row]) -> str:
    """Rows as Markdown, equal ones counted."""
    lines = [
        "| command | at | fault | points | exit | left | the same again | then |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row, points in Counter(rows).items():
        command, at, fault, status, left, again, then = row
        cells = (command, at, fault, points, status, left, again, then)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def documented() -> set[Row]:
    """The rows of the page, without their counts."""
    text = PAGE.read_text(encoding="utf-8")
    found = set()
    for line in text[text.index(BEGIN) + len(BEGIN) : text.index(END)].splitlines()[2:]:
        command, at, fault, _, status, left, again, then = line.strip("| ").split(" | ")
        found.add((command, at, fault, int(status), left, int(again), then))
    return found


def write_table() -> None:
    """Sweep over everything and rewrite the table."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        places = make_places(root)
        for command in (*faults.CASES, PUSH):
            rows += rows_of(command, places, root / "work", 1)
    text = PAGE.read_text(encoding="utf-8")
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    PAGE.write_text(text[:begin] + render(sorted(rows)) + text[end:], encoding="utf-8")
