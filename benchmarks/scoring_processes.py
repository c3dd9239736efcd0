"""Scoring in two processes against one: the same file, byte for byte, and the ratio of times.

Runs `calibrate` on the bundled model as a user would, alone and under torchrun, in turn, each
process with one thread. Then two processes again, of which one is killed midway, and one process
that resumes.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

MODEL = Path(__file__).parent / "demo-model"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")


def command(out: Path, samples: int, *, processes: int) -> list[str]:
    """The command line of one calibration."""
    start = [sys.executable] if processes == 1 else list(TORCHRUN)
    options = ["--recipe", "demo", "--exact", "--samples", str(samples), "--force", "-q", "--json"]
    return [*start, "-m", "converter", "calibrate", str(MODEL), "--out", str(out), *options]


def seconds_of(out: Path, samples: int, processes: int) -> float:
    """Wall-clock seconds of one calibration."""
    started = time.perf_counter()
    subprocess.run(
        command(out, samples, processes=processes),
        check=True,
        env=ENVIRONMENT,
        capture_output=True,
    )
    return time.perf_counter() - started


def records(work: Path) -> int:
    """Examples that journals hold, all processes together."""
    return sum(max(0, path.read_bytes().count(b"\n") - 1) for path in work.glob("*.jsonl"))


def child_of(launcher: int, rank: int) -> int:
    """The process of a rank that a launcher has started."""
    for status in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = status.read_bytes().split(b"\0")
            parent = (status.parent / "stat").read_text().rsplit(")", 1)[1].split()[1]
        except OSError:
            continue
        if int(parent) == launcher and f"RANK={rank}".encode() in variables:
            return int(status.parent.name)
    raise ProcessLookupError(f"no rank {rank} under {launcher}")


def killed_midway(out: Path, samples: int) -> tuple[int, int]:
    """Kill rank 1 of two when about half is done; the launcher's status, and what is kept."""
    work = out.with_name(f"{out.name}.work")
    launcher = subprocess.Popen(
        command(out, samples, processes=2),
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while records(work) < samples // 2:
        time.sleep(0.05)
    os.kill(child_of(launcher.pid, 1), signal.SIGKILL)
    return launcher.wait(), records(work)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--samples", type=int, default=512)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        seconds: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(options.runs):
            for processes, times in seconds.items():
                out = root / f"{processes}.json"
                times.append(seconds_of(out, options.samples, processes))
        one, two = (statistics.median(times) for times in seconds.values())
        expected = (root / "1.json").read_bytes()
        same = expected == (root / "2.json").read_bytes()
        print(
            f"torch {version('torch')}, Python {platform.python_version()}, {os.cpu_count()} cores,"
            f" medians of {options.runs} alternating runs, {options.samples} examples"
        )
        print(
            f"two processes take {two / one:.2f} of the time of one ({two:.1f} s against "
            f"{one:.1f} s, starting Python included); files {'equal' if same else 'DIFFERENT'}"
        )
        out = root / "killed.json"
        status, kept = killed_midway(out, options.samples)
        written = out.exists()
        resumed = seconds_of(out, options.samples, 1)
        same = out.read_bytes() == expected
        print(
            f"one of two killed: exit {status}, {'a' if written else 'no'} scores file, {kept} "
            f"examples kept; one process finished in {resumed:.1f} s, "
            f"file {'equal' if same else 'DIFFERENT'}"
        )


if __name__ == "__main__":
    main()
