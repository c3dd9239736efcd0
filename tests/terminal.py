"""A terminal of 80 columns: a command runs in it, and what it leaves on the screen is read."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Mapping
from pathlib import Path

COLUMNS = 80
_CODE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])")


def run_in_terminal(folder: Path, *arguments: object, **environment: str) -> tuple[int, str]:
    """Run the command line in a folder and a pseudo-terminal; its exit status and its words."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        command = [sys.executable, "-m", "converter", *map(str, arguments)]
        os.execve(sys.executable, command, environment_of(environment))  # noqa: S606
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    written = b""
    while True:
        try:
            piece = os.read(terminal, 1 << 16)
        except OSError:
            break
        if not piece:
            break
        written += piece
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), written.decode()


def environment_of(changes: Mapping[str, str]) -> dict[str, str]:
    """This process's environment for a child that is no test, with some changes."""
    ours = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    root = str(Path(__file__).parent.parent)
    return {**ours, "PYTHONPATH": root, "TERM": "xterm", "OMP_NUM_THREADS": "1", **changes}


def screen(written: str) -> list[str]:
    """The lines that are left, as a terminal folds long ones and obeys codes."""
    rows: list[list[str]] = [[]]
    row = column = place = 0

    def cell(at: int) -> list[str]:
        while len(rows) <= at:
            rows.append([])
        return rows[at]

    while place < len(written):
        if code := _CODE.match(written, place):
            place = code.end()
            if code[2] == "A":
                row = max(0, row - int(code[1] or 1))
            elif code[2] == "K":
                kept = cell(row)[: 0 if code[1] == "2" else column]
                rows[row] = kept
            continue
        letter, place = written[place], place + 1
        if letter == "\r":
            column = 0
        elif letter == "\n" or column == COLUMNS:
            row, column = row + 1, 0
        if letter >= " ":
            line = cell(row)
            line += [" "] * (column + 1 - len(line))
            line[column] = letter
            column += 1
    lines = ["".join(line).rstrip() for line in rows]
    while lines and not lines[-1]:
        lines.pop()
    return lines
