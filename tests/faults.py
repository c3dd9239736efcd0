"""Faults at every point where a command touches the disk, or asks the Hub: what is left, what then.

    python -m tests.faults

sweeps over every command of `CASES` and writes the table of docs/faults.md. A sweep runs a command
once to list its points: file-system events of Python's audit hooks below a folder, and calls of
fsync. Then, for each point and each fault that can happen there, it forks, lets the fault strike,
looks at what is left, and gives the same command again. A new command is one more line in `CASES`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate"}
FSYNC = "os.fsync"
# A write fails in the middle: the kernel lets no file grow past these bytes.
SHORT_BYTES = 7
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# At which point, which fault, the exit status (-9 for the killed), the state it left, the exit
# status of the same command given again, and the state after that with what else lies there.
Outcome = tuple[str, str, int, str, int, str]


@dataclass(frozen=True)
class Point:
    """One point where a fault can strike: an operation, and whether it writes."""

    operation: str
    writes: bool


@dataclass(frozen=True)
class Fault:
    """What happens at points that it fits; when it lasts, at every later one, too."""

    name: str
    fits: Callable[[Point], bool]
    strike: Callable[[], None]
    lasts: bool = False


def _refuse(number: int) -> None:
    raise OSError(number, os.strerror(number))


def _stop_growing() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (SHORT_BYTES, resource.RLIM_INFINITY))


KILL = "kill -9"
FAULTS = (
    Fault(KILL, lambda _: True, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    Fault("disk full (ENOSPC)", lambda p: p.writes, partial(_refuse, errno.ENOSPC), lasts=True),
    Fault("no permission (EACCES)", lambda p: p.operation != FSYNC, partial(_refuse, errno.EACCES)),
    Fault(
        "a write fails halfway (EFBIG)", lambda p: p.operation == "open" and p.writes, _stop_growing
    ),
    Fault("fsync fails (EIO)", lambda p: p.operation == FSYNC, partial(_refuse, errno.EIO)),
)


@dataclass(frozen=True)
class Case:
    """A command to be disturbed.

    Attributes:
        first, again: its arguments, and given again; `FOLDER`, `SOURCE` and `OUT` are places.
        look: names the state of the folder (see `LOOKS`).
        old: whether a finished output stands there before.
        preload: modules that a child would take long to load.
    """

    first: tuple[str, ...]
    again: tuple[str, ...]
    look: str
    old: bool = False
    preload: tuple[str, ...] = ("converter.pipeline", "yaml")


_CONVERT = ("convert", "SOURCE", "OUT", "--window", "24", "--layers", "1,2", "-q")
_RETARGET = ("retarget", "OUT", "--layers", "1,2", "-q")
_EXPORT = ("export", "SOURCE", "FOLDER/model.gguf", "--type", "f16", "-q")
_CALIBRATE = (
    *("calibrate", "SOURCE", "--out", "FOLDER/scores.json", "--window", "16"),
    *("--method", "nll-restore", "--samples", "2", "--length", "300", "-q"),
)
CASES = {
    "convert": Case(_CONVERT, (*_CONVERT, "--force"), "checkpoint"),
    "convert --force": Case((*_CONVERT, "--force"), (*_CONVERT, "--force"), "checkpoint", old=True),
    "retarget": Case(_RETARGET, _RETARGET, "checkpoint", old=True),
    "export": Case(_EXPORT, (*_EXPORT, "--force"), "gguf", preload=("gguf",)),
    "calibrate": Case(
        _CALIBRATE,
        (*_CALIBRATE, "--force"),
        "scores",
        preload=("torch", "transformers.models.qwen3.modeling_qwen3", "transformers"),
    ),
}


def look_at_checkpoint(folder: Path) -> str:
    """`nothing`, `the old one`, `the new one`, the old one aside, or what is wrong."""
    from converter.checkpoint.reader import open_checkpoint
    from converter.checkpoint.verify.static import static_checks

    out, aside = folder / "out", folder / ".out.replaced"
    known = {out.name, aside.name, ".out.partial"}
    if strange := {entry.name for entry in folder.iterdir()} - known:
        return f"BROKEN: {strange}"
    found = out if out.exists() else aside
    if not found.exists():
        return "nothing"
    source, plan = open_checkpoint(found)
    broken = [check.name for check in static_checks(found, source, plan, None) if not check.ok]
    name = {(0, 3): "the old one", (1, 2): "the new one"}[plan.full_attention_layers]
    return f"BROKEN: {broken}" if broken else name if found == out else f"{name}, aside"


def look_at_file(path: Path, read: Callable[[Path], bool]) -> str:
    """`nothing` or `the new one`, or what is wrong."""
    from converter.common.errors import HybridizeError

    if not path.exists():
        return "nothing"
    try:
        return "the new one" if read(path) else "BROKEN: too little"
    except HybridizeError as error:
        return f"BROKEN: {error}"


def look_at_scores(folder: Path) -> str:
    from converter.calibration.scores_file import load_scores

    return look_at_file(folder / "scores.json", lambda path: len(load_scores(path).examples) == 2)


def look_at_gguf(folder: Path) -> str:
    from converter.engines.gguf.hybrid_file import open_hybrid

    return look_at_file(folder / "model.gguf", lambda path: bool(open_hybrid(path)))


LOOKS = {"checkpoint": look_at_checkpoint, "scores": look_at_scores, "gguf": look_at_gguf}
# What a command is asked for; anything else must be gone when it has succeeded.
RESULTS = {"out", "scores.json", "model.gguf"}


def watch(folder: Path, see: Callable[[Point], None]) -> None:
    """Call `see` before every operation below a folder, in this process from now on."""
    real_fsync, prefix = os.fsync, str(folder)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in EVENTS:
            return
        paths = [os.fsdecode(arg) for arg in args if isinstance(arg, (str, bytes, os.PathLike))]
        if any(path.startswith(prefix) for path in paths):
            writes = event in ("os.mkdir", "os.rename", "os.link", "os.truncate")
            if event == "open":
                flags, mode = int(args[2] or 0), str(args[1])
                writes = bool(flags & _WRITING) or any(letter in mode for letter in "wax+")
            see(Point(event, writes))

    def fsync(descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        path = str(Path(f"/proc/self/fd/{number}").readlink())
        if path.startswith(prefix):
            see(Point(FSYNC, True))
        real_fsync(descriptor)

    os.fsync = fsync
    sys.addaudithook(hook)


def in_fork(arguments: list[str], prepare: Callable[[], None]) -> int:
    """Run a command in a fork; its exit status."""
    from converter.cli import run

    pid = os.fork()
    if pid == 0:
        status = 99
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123
            sys.stdout = sys.stderr = nowhere
            prepare()
            with contextlib.suppress(BaseException):
                status = run(arguments)
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def sweep(name: str, source: Path, old: Path, folder: Path, *, every: int) -> list[Outcome]:
    """Every fault at every `every`-th point of a command. For a process that has one thread."""
    case, look = CASES[name], LOOKS[CASES[name].look]
    places = {"FOLDER": folder, "SOURCE": source, "OUT": folder / "out"}

    def filled(command: tuple[str, ...]) -> list[str]:
        return [str(places.get(word, word)).replace("FOLDER/", f"{folder}/") for word in command]

    def restart() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if case.old:
            shutil.copytree(old, folder / "out")

    for module in case.preload:
        __import__(module)
    restart()
    points = points_of(folder, filled(case.first))
    outcomes = []
    for index, point in enumerate(points):
        for number, fault in enumerate(FAULTS):
            if not fault.fits(point) or (index + number) % every:
                continue
            restart()
            status = in_fork(filled(case.first), lambda i=index, f=fault: arm(folder, i, f))
            left = look(folder)
            again = in_fork(filled(case.again), lambda: None)
            others = {entry.name for entry in folder.iterdir()} - RESULTS
            then = ", beside ".join([look(folder), *sorted(others)])
            operation = point.operation.removeprefix("os.")
            outcomes.append((operation, fault.name, status, left, again, then))
    return outcomes


def points_of(folder: Path, arguments: list[str]) -> list[Point]:
    """Every point of a command that succeeds, in order."""
    log = folder.with_name("points.jsonl")
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def see(point: Point) -> None:
        with contextlib.suppress(OSError):
            os.write(descriptor, json.dumps(asdict(point)).encode() + b"\n")

    assert in_fork(arguments, lambda: watch(folder, see)) == 0
    os.close(descriptor)
    return [Point(**json.loads(line)) for line in log.read_text().splitlines()]


def arm(folder: Path, index: int, fault: Fault) -> None:
    """Let a fault strike at one point below a folder, in this process from now on."""
    seen = 0

    def see(point: Point) -> None:
        nonlocal seen
        now = seen == index or (fault.lasts and seen > index and fault.fits(point))
        seen += 1
        if now:
            fault.strike()

    watch(folder, see)


def run_sweep(module: str, *arguments: object) -> list[Any]:
    """Outcomes of a module's sweep, in a process of its own, without threads."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [tuple(row) for row in json.loads(done.stdout.splitlines()[-1])]


if __name__ == "__main__":
    if sys.argv[1:]:
        _name, *_paths, _every = sys.argv[1:]
        print(json.dumps(sweep(_name, *map(Path, _paths), every=int(_every))))  # noqa: T201
    else:
        from tests.fault_table import write_table

        write_table()
