"""The command line, waiting for its end once it has found enough.

`python -m tests.held COUNT TITLE ARGUMENTS...` blocks when COUNT records stand in a log whose
name begins with TITLE, so that whoever is to kill it cannot come too late.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from converter.calibration.cache import ResultLog
from converter.cli import main


def hold(count: int, title: str) -> None:
    """Have the log block after a record."""
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
