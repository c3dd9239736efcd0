"""Runs every hostile input of `tests/hostile_cases.py`.

    python -m tests.hostile

writes the table of docs/trust.md; `tests/test_hostile.py` runs them again and compares.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from tests import hostile_cases, hostile_code, hostile_ggufs
from tests.conftest import make_model, run_cli
from tests.hostile_cases import RAN, Case, Place

CASES = (*hostile_cases.CASES, *hostile_code.CASES, *hostile_ggufs.CASES)
PAGE = Path(__file__).parent.parent / "docs" / "trust.md"
BEGIN, END = "<!-- table: python -m tests.hostile -->\n", "<!-- end of table -->\n"


def make_sources(root: Path) -> dict[str, Path]:
    """The models that the cases start from, by family."""
    families = {case.family for case in CASES}
    return {name: make_model(root / name, name, shards=name == "qwen2") for name in families}


def outcome(case: Case, source: Path, root: Path) -> tuple[int, str, Place]:
    """Run a case on a copy of a model; its exit status and what it said, without places."""
    place = Place(root / "model", root / "beside")
    shutil.copytree(source, place.model)
    place.beside.mkdir()
    words, before = io.StringIO(), Path.cwd()
    os.chdir(place.beside)
    try:
        with contextlib.redirect_stderr(words), contextlib.redirect_stdout(words):
            status = run_cli(*case.build(place))
    finally:
        os.chdir(before)
    return status, summary(words.getvalue(), root), place


def summary(text: str, root: Path) -> str:
    """What a message says, in one line that is the same on every machine."""
    lines = [line for line in text.splitlines() if line.strip()]
    kept = [line for line in lines if line.startswith(("error: ", "  got: ", "FAILED"))]
    line = "; ".join(line.strip().removeprefix("error: ") for line in kept)
    line = line.replace(f"{root}{os.sep}", "").replace(str(root), "")
    line = re.sub(r"0x[0-9a-f]+", "0x…", line)
    return (line if len(line) <= 180 else f"{line[:179]}…").replace("|", "\\|") or "done"


def row(case: Case, status: int, said: str) -> str:
    return f"| {case.title} | {status} | {said} |"


def main() -> None:
    """Run every case and rewrite the table."""
    table = "| input | exit | what was said |\n|---|---|---|\n"
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        sources = make_sources(root)
        for number, case in enumerate(CASES):
            status, said, place = outcome(case, sources[case.family], root / str(number))
            assert status == case.status, (case.title, status, said)
            assert not list(place.beside.rglob(RAN)), case.title
            table += row(case, status, said) + "\n"
    text = PAGE.read_text(encoding="utf-8")
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    PAGE.write_text(text[:begin] + table + text[end:], encoding="utf-8")
    print(table, file=sys.stderr)  # noqa: T201


if __name__ == "__main__":
    main()
