"""A sample of the faults of docs/faults.md, repeated: each leaves the old or the new, whole."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from converter.common.files import building
from tests import faults, push_faults, source_faults
from tests.conftest import run_cli
from tests.fault_table import PUSH, WHOLE, documented, rows_of
from tests.ggufs import hybrid_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# Every fault is tried at every EVERY-th point, or at more where there are few; `python -m
# tests.faults` tries all.
EVERY = 8
FEW = {"export": 2}
OPTIONS = ("--layers", "1,2", "--window", "24")


@pytest.mark.parametrize("command", [*faults.CASES, PUSH])
def test_a_command_that_fails_anywhere_leaves_the_old_or_the_new(
    command: str, sources: dict[str, Path], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    places = {**sources, "old": checkpoint("qwen2", "plain", (0, 3))}
    if command == "export":
        places["checkpoint"] = hybrid_of(tmp_path, "qwen3")
    rows = rows_of(command, places, tmp_path / "work", FEW.get(command, EVERY))
    assert len(rows) >= 5
    unknown = set(rows) - documented()
    assert not unknown, f"run: python -m tests.faults, for {unknown}"


def test_the_table_is_about_every_command() -> None:
    rows = documented()
    assert {row[0] for row in rows} == {*faults.CASES, PUSH}
    assert {row[2] for row in rows} == {f.name for f in faults.FAULTS} | set(push_faults.FAULTS)
    assert {row[4] for row in rows} <= set(WHOLE)
    assert {(row[5], row[6]) for row in rows} == {(0, "the new one")}


def test_weights_that_change_under_a_command_are_refused_or_whole(tmp_path: Path) -> None:
    """Those that are quick; `tests/test_weights_identity.py` has the others."""
    names = ["calibrate", "plan by scores", "convert by layers", "convert --copy", "retarget"]
    template = source_faults.make_places(tmp_path)
    outcomes = source_faults.run_sweeps(template, tmp_path / "work", 4, names)
    source_faults.hold(outcomes)
    assert {(row[0], row[1]) for row in outcomes} == set(product(names, source_faults.FAULTS))
    # Refused in most cases, not only overtaken.
    assert sum(row[2] == 2 for row in outcomes) > len(outcomes) // 2


def test_conversions_killed_at_random_times_leave_nothing_or_all(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    """In the middle of an operation, too, where no event is."""
    out, generator = tmp_path / "out", random.Random(0)  # noqa: S311 - reproducible delays
    command = ("convert", sources["qwen2"], out, *OPTIONS, "-q")
    for _ in range(10):
        process = subprocess.Popen([sys.executable, "-m", "converter", *command])
        time.sleep(generator.uniform(0.05, 0.5))
        process.kill()
        process.wait()
        assert faults.look_at_checkpoint(tmp_path) in ("nothing", "the new one")
        shutil.rmtree(out, ignore_errors=True)
    assert run_cli(*command) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_replacement_that_died_between_its_renames_is_found_again(
    checkpoint: Callable[..., Path],
    sources: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without --force, which would replace it: what stood aside is the output that exists."""
    for name in (".out.replaced", ".out.partial"):
        shutil.copytree(checkpoint("qwen2", "plain", (0, 3)), tmp_path / name)
    assert run_cli("convert", sources["qwen2"], tmp_path / "out", *OPTIONS) == 2
    assert "the output exists already" in capsys.readouterr().err
    assert not (tmp_path / ".out.replaced").exists()
    assert faults.look_at_checkpoint(tmp_path) == "the old one"


def test_two_processes_do_not_write_the_same_output(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with building(out) as partial:
        (partial / "theirs").write_text("half")
        assert run_cli("convert", sources["llama"], out, *OPTIONS) == 2
        assert "another process is writing this output" in capsys.readouterr().err
        assert (partial / "theirs").read_text() == "half"
    # The other one gave up without a result: its place is free.
    assert run_cli("convert", sources["llama"], out, *OPTIONS, "-q") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
