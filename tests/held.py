"""Measurements in processes of their own, which wait to be killed once they have found enough.

`python -m tests.held COUNT TITLE ARGUMENTS...` is the command line; it blocks when COUNT records
stand in a log whose name begins with TITLE, so that whoever is to kill it cannot come too late.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from converter.calibration.cache import ResultLog
from converter.cli import main


def write_rows(path: Path, count: int, length: int, seed: int) -> Path:
    """Examples long enough to be killed among, as `--data` takes them."""
    generator = random.Random(seed)  # noqa: S311 - a reproducible text, not a secret
    rows = [
        {"prompt": "".join(generator.choices("abcdefg ", k=length)) + ".", "answer": f"yes {row}"}
        for row in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def start(*arguments: object) -> subprocess.Popen[str]:
    """This interpreter, in one thread, from the checkout."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )


def wait_for_records(logs: Iterable[Path], count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not all(log.exists() and log.read_bytes().count(b"\n") > count for log in logs):
        assert process.poll() is None, "it finished or failed before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def records_of(log: Path) -> list[dict[str, Any]]:
    """The whole results in a log, its head and a line without an end left out."""
    *lines, _end = log.read_text().split("\n")
    return [json.loads(line) for line in lines[1:]]


def hold(count: int, title: str) -> None:
    append = ResultLog.append

    def held(self: ResultLog, record: Mapping[str, Any]) -> None:
        append(self, record)
        # The first line is the log's head.
        if self.path.name.startswith(title) and self.path.read_bytes().count(b"\n") > count:
            time.sleep(600)

    ResultLog.append = held  # type: ignore[method-assign]


if __name__ == "__main__":
    hold(int(sys.argv[1]), sys.argv[2])
    del sys.argv[1:3]
    main()
