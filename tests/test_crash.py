"""A conversion killed at any moment leaves no checkpoint or a whole one, never half of one."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_convert import files_of
from tests.conftest import run_cli

OPTIONS = ("--layers", "1,2", "--window", "24")

# Run a command in a fork that is killed at its n-th look at the file system below a folder, for
# n = 1, 2, ... until one lives to its end; then another command, undisturbed. Print what each of
# the two left. The parent never loads torch, so that a fork is quick and safe.
SWEEP = """
import json, os, shutil, signal, sys
from pathlib import Path
from converter.cli import run
from converter.checkpoint.verify.static import static_checks
from converter.checkpoint.reader import open_checkpoint

folder, old, first, second = Path(sys.argv[1]), sys.argv[2], *map(json.loads, sys.argv[3:])
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate"}
out = folder / "out"

def found():
    names = sorted(entry.name for entry in folder.iterdir())
    if not out.exists():
        return names, "absent"
    source, plan = open_checkpoint(out)
    broken = [check.name for check in static_checks(out, source, plan, None) if not check.ok]
    return names, broken or list(plan.full_attention_layers)

def die_at(deadly):
    seen = 0
    def hook(event, args):
        nonlocal seen
        if event in EVENTS and any(str(folder) in str(arg) for arg in args):
            seen += 1
            if seen == deadly:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

def fork_and_run(arguments, deadly=None):
    pid = os.fork()
    if pid == 0:
        sys.stdout = open(os.devnull, "w")
        if deadly is not None:
            die_at(deadly)
        os._exit(run(arguments))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

results, status = [], -signal.SIGKILL
while status == -signal.SIGKILL:
    for entry in folder.iterdir():
        shutil.rmtree(entry)
    if old:
        shutil.copytree(old, out)
    status = fork_and_run(first, len(results) + 1)
    left = found()
    results.append([status, *left, fork_and_run(second), *found()])
print(json.dumps(results))
"""


def sweep(
    folder: Path, old: Path | None, first: tuple[object, ...], second: tuple[object, ...]
) -> list[tuple[list[str], Any]]:
    """What each death left: the names in the folder, and the plan of the checkpoint or "absent".

    The second command must have succeeded after each of them, and the first must do so at last.
    """
    folder.mkdir()
    commands = [json.dumps([*map(str, command), "-q"]) for command in (first, second)]
    done = subprocess.run(
        [sys.executable, "-c", SWEEP, folder, str(old or ""), *commands],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *deaths, survivor = json.loads(done.stdout.splitlines()[-1])
    assert len(deaths) > 30, "every file that is written is a moment to die at"
    assert survivor == [0, ["out"], [1, 2], 0, ["out"], [1, 3]]
    assert [death[3:] for death in deaths] == [[0, ["out"], [1, 3]]] * len(deaths), done.stderr
    assert {death[0] for death in deaths} == {-signal.SIGKILL}
    return [(names, plan) for _, names, plan, *_ in deaths]


def test_a_conversion_killed_at_any_moment_leaves_nothing_or_all(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "work" / "out"
    convert = ("convert", sources["qwen2"], out, "--window", 24, "--layers")
    states = sweep(tmp_path / "work", None, (*convert, "1,2"), (*convert, "1,3", "--force"))
    for names, plan in states:
        assert set(names) <= {".out.partial", "out"}
        assert plan == ("absent" if "out" not in names else [1, 2])
    assert {str(plan) for _, plan in states} == {"absent", "[1, 2]"}


@pytest.mark.parametrize("command", ["convert --force", "retarget"])
def test_a_replacement_killed_at_any_moment_leaves_the_old_or_the_new(
    command: str, checkpoint: Callable[..., Path], sources: dict[str, Path], tmp_path: Path
) -> None:
    """Retargeting even reads the folder that it replaces."""
    old, out = checkpoint("llama", "plain", (0, 3)), tmp_path / "work" / "out"
    replace: tuple[object, ...] = ("retarget", out, "--layers")
    if command == "convert --force":
        replace = ("convert", sources["llama"], out, "--window", 24, "--force", "--layers")
    states = sweep(tmp_path / "work", old, (*replace, "1,2"), (*replace, "1,3"))
    for names, plan in states:
        assert set(names) <= {".out.partial", ".out.replaced", "out"}
        # Between its two renames the old one stands aside, whole.
        assert plan in ([0, 3], [1, 2]) or (plan == "absent" and ".out.replaced" in names)
    seen = [str(plan) for _, plan in states]
    assert sorted(set(seen), key=seen.index) == ["[0, 3]", "absent", "[1, 2]"]


def test_conversions_killed_at_random_times_leave_nothing_or_all(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    from converter.checkpoint.reader import open_checkpoint
    from converter.checkpoint.verify.static import static_checks

    out, generator = tmp_path / "out", random.Random(0)  # noqa: S311 - reproducible delays
    for _ in range(10):
        process = subprocess.Popen(
            [sys.executable, "-m", "converter", "convert", sources["qwen2"], out, *OPTIONS, "-q"],
            stdout=subprocess.DEVNULL,
        )
        time.sleep(generator.uniform(0.05, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.exists():
            opened, plan = open_checkpoint(out)
            assert all(check.ok for check in static_checks(out, opened, plan, None))
            shutil.rmtree(out)
    assert run_cli("convert", sources["qwen2"], out, *OPTIONS, "-q") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_an_interrupted_replacement_is_undone_or_finished(tmp_path: Path) -> None:
    from converter.common.files import building, finish_folder, restore_replaced

    final, aside = tmp_path / "out", tmp_path / ".out.replaced"
    restore_replaced(final)
    assert not list(tmp_path.iterdir())

    aside.mkdir()
    (aside / "name").write_text("old")
    restore_replaced(final)
    assert (final / "name").read_text() == "old" and not aside.exists()

    aside.mkdir()
    (aside / "name").write_text("older")
    restore_replaced(final)
    assert (final / "name").read_text() == "old" and not aside.exists()

    with building(final) as partial:
        (partial / "name").write_text("new")
        (partial / "inner").mkdir()
        finish_folder(partial, final)
    assert (final / "name").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_replacement_that_died_between_its_renames_is_found_again(
    checkpoint: Callable[..., Path],
    sources: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    old, out = checkpoint("llama", "plain", (0, 3)), tmp_path / "out"
    shutil.copytree(old, tmp_path / ".out.replaced")
    shutil.copytree(old, tmp_path / ".out.partial")
    assert run_cli("convert", sources["llama"], out, *OPTIONS) == 2
    assert "the output exists already" in capsys.readouterr().err
    assert files_of(out) == files_of(old)
    assert not (tmp_path / ".out.replaced").exists()


def test_two_processes_do_not_write_the_same_output(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from converter.common.files import building

    out = tmp_path / "out"
    with building(out) as partial:
        (partial / "theirs").write_text("half")
        assert run_cli("convert", sources["llama"], out, *OPTIONS) == 2
        assert "another process is writing this output" in capsys.readouterr().err
        assert (partial / "theirs").read_text() == "half"
    # The other one gave up without a result: its place is free.
    assert run_cli("convert", sources["llama"], out, *OPTIONS, "-q") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
