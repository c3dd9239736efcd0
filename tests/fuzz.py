"""Damages every kind of file that a command reads, over and over, and counts what came of it.

    python -m tests.fuzz --inputs 1000 --seed 1

A process that has imported everything is forked for each input; the copy runs one command under
limits of memory and time. It may succeed, find fault with a checkpoint (`verify`), or refuse with
one message and exit status 2. Anything else is printed, with the command that does it again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import psutil

from converter.common.errors import HybridizeError
from tests.fuzz_inputs import KINDS, PARTS, Command, Kind, make_bases

# Beyond what the forked process has already.
MEMORY_BYTES = 2 << 30
CPU_SECONDS = 30
# Of the clock, for what waits; the machine may be busy.
SECONDS = 120
COMMAND = (sys.executable, "-m", "tests.fuzz")
GOOD = ("ok", "fault found", "refused")
BAD = ("traceback", "no message", "hang", "signal")


@dataclass(frozen=True)
class Result:
    """What came of one input.

    Attributes:
        outcome: one of `GOOD` and `BAD`.
        said: the end of the error output.
        bytes: peak memory of the process, libraries included.
    """

    number: int
    kind: str
    command: str
    outcome: str
    said: str
    bytes: int
    seconds: float


def run_input(number: int, seed: int, bases: Path) -> Result:
    """Damage one file and run one command on it, in a process of its own."""
    random = Random(f"{seed}:{number}")  # noqa: S311 - the same inputs every time
    kind: Kind = KINDS[number % len(KINDS)]
    command = random.choice(kind.commands)
    return run_damaged(number, kind, command, bases, random)


def run_damaged(
    number: int, kind: Kind, command: Command, bases: Path, random: Random, *, damage: bool = True
) -> Result:
    """Run a command of a kind on copies of its good inputs, with the one file damaged."""
    with tempfile.TemporaryDirectory(prefix="hybridize-fuzz-") as temporary:
        place = Path(temporary)
        for base in kind.bases(random):
            shutil.copytree(bases / base, place / base.split("-")[0])
        file = place / kind.file
        if damage:
            file.write_bytes(kind.damage(random, file.read_bytes()))
        arguments = [str(part) for part in command(place)]
        (place / "work").mkdir()
        return run_command(number, kind.name, arguments, place)


def run_command(number: int, kind: str, arguments: list[str], place: Path) -> Result:
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _be_the_child(arguments, place)
    status, usage, killed = _wait(child)
    said = (place / "stderr").read_text(errors="replace")
    return Result(
        number,
        kind,
        " ".join(arguments).replace(str(place), "."),
        "hang" if killed else _outcome(os.waitstatus_to_exitcode(status), arguments[0], said),
        said.replace(str(place), ".")[-1500:],
        usage.ru_maxrss * 1024,
        time.monotonic() - started,
    )


def _be_the_child(arguments: list[str], place: Path) -> None:
    """Run a command as a user would, and never return."""
    from tests.conftest import run_cli

    status = 70
    try:
        os.setsid()
        for number, name in ((0, os.devnull), (1, place / "stdout"), (2, place / "stderr")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        # Where the parent's are not these, as under pytest.
        sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))
        os.chdir(place / "work")
        allowed = psutil.Process().memory_info().vms + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        name, *rest = arguments
        status = PARTS[name](*rest) if name in PARTS else run_cli(*arguments)
    except HybridizeError as error:
        sys.stderr.write(f"error: {error}\n")
        status = 2
    except BaseException:  # noqa: BLE001 - this is what is counted
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(child: int) -> tuple[int, Any, bool]:
    """The child's status and use of memory, and whether it had to be killed."""
    deadline, killed = time.monotonic() + SECONDS, False
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return status, usage, killed
        if time.monotonic() > deadline and not killed:
            killed = True
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.005)


def _outcome(status: int, command: str, said: str) -> str:
    if status < 0:
        return "hang" if status == -signal.SIGXCPU else "signal"
    if "Traceback (most recent call last)" in said:
        return "traceback"
    if status == 2:
        one = sum(line.startswith(("error: ", "Error: ")) for line in said.splitlines()) == 1
        return "refused" if one else "no message"
    return "ok" if status == 0 else "fault found" if command == "verify" else "no message"


def work(inputs: range, seed: int) -> None:
    """Run inputs one after another; a line of JSON for each on stdout."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory(prefix="hybridize-fuzz-bases-") as temporary:
        bases = Path(temporary)
        make_bases(bases)
        done = (run_input(number, seed, bases) for number in inputs) if inputs else _good(bases)
        for result in done:
            print(json.dumps(asdict(result)), file=out, flush=True)


def _good(bases: Path) -> Iterator[Result]:
    """Every command on what is not damaged; nothing is found in one that always refuses."""
    random = Random(0)  # noqa: S311
    for kind in KINDS:
        for command in dict.fromkeys(kind.commands):
            yield run_damaged(0, kind, command, bases, random, damage=False)


def fuzz(inputs: int, seed: int, jobs: int) -> list[Result]:
    """Share the inputs among processes; results in order."""
    with tempfile.TemporaryDirectory(prefix="hybridize-fuzz-modules-") as modules:
        workers = [
            subprocess.Popen(
                [*COMMAND, "--seed", str(seed), "--worker", f"{job},{inputs},{jobs}"],
                stdout=subprocess.PIPE,
                text=True,
                # transformers copies a model's code to one place before it runs it.
                env=os.environ
                | {"HF_MODULES_CACHE": f"{modules}/{job}", "TOKENIZERS_PARALLELISM": "false"}
                | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            )
            for job in range(jobs)
        ]
        lines = [line for worker in workers for line in worker.communicate()[0].splitlines()]
        if any(worker.returncode for worker in workers):
            raise RuntimeError("a worker of the fuzzer failed")
    return sorted((Result(**json.loads(line)) for line in lines), key=lambda r: r.number)


def table(results: list[Result]) -> str:
    """Counts by kind of file, as Markdown."""
    names = ("file", "inputs", *GOOD, *BAD, "most memory")
    lines = [f"| {' | '.join(names)} |"]
    lines.append("|---" * len(names) + "|")
    for name in (*dict.fromkeys(kind.name for kind in KINDS), "all"):
        rows = [result for result in results if name in (result.kind, "all")]
        count = Counter(row.outcome for row in rows)
        told = [len(rows), *(count[outcome] for outcome in (*GOOD, *BAD))]
        peak = max((row.bytes for row in rows), default=0) >> 20
        lines.append(f"| {name} | {' | '.join(map(str, told))} | {peak} MiB |")
    return "\n".join(lines)


def main() -> None:
    """Fuzz, or run the share of one worker."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1000, help="0 for undamaged ones")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--only", type=int, metavar="NUMBER", help="one input, to look at")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(range(*map(int, given.worker.split(","))), given.seed)
        return
    if given.only is not None:
        work(range(given.only, given.only + 1), given.seed)
        return
    if given.inputs == 0:
        work(range(0), given.seed)
        return
    started = time.monotonic()
    results = fuzz(given.inputs, given.seed, given.jobs)
    bad = [result for result in results if result.outcome in BAD]
    say = partial(print, flush=True)
    for one in bad:
        say(f"== {one.outcome}: python -m tests.fuzz --seed {given.seed} --only {one.number}")
        say(f"{one.kind}: {one.command}\n{one.said}")
    say(table(results))
    say(f"{len(bad)} bad of {len(results)}, {time.monotonic() - started:.0f} s", file=sys.stderr)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
