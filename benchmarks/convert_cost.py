"""What a conversion by a given plan costs: seconds, memory and disk, for 8 GB and for 1/1000 of it.

Runs the two conversions in turn, each a whole process, and prints medians and their ratio. The
weights are sparse files, so the disk that the machine has does not matter.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from peak_memory import peak_mib
from sparse_model import QWEN3_4B, write_sparse_model

_SMALL = QWEN3_4B | {"hidden_size": 64, "intermediate_size": 256, "vocab_size": 4096}


def allocated_bytes(folder: Path) -> int:
    """Disk blocks under a folder, each file once."""
    seen = {path.stat().st_ino: path.stat().st_blocks for path in folder.rglob("*")}
    return 512 * sum(seen.values())


def convert(source: Path, out: Path) -> tuple[float, float]:
    """Seconds and peak memory (MiB) of one `hybridize convert`."""
    arguments = ["convert", str(source), str(out), "--force", "-q", "--window", "2048"]
    arguments += ["--layers", "3,7,11,15,19,23,27,31,35"]
    started = time.perf_counter()
    command = [sys.executable, __file__, "--measure", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return time.perf_counter() - started, float(done.stderr.splitlines()[-1])


def measure(arguments: list[str]) -> None:
    """The body of that process: the command line, and then its peak memory on stderr."""
    from converter.cli import run

    status = run(arguments)
    print(peak_mib(), file=sys.stderr)
    sys.exit(status)


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        cases = {}
        for name, config, shards in (("8 GB", QWEN3_4B, 3), ("small", _SMALL, 3)):
            folder = root / name.replace(" ", "")
            folder.mkdir()
            cases[name] = (folder, write_sparse_model(folder, config, shards))
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
        for run in range(runs + 1):
            for name, (folder, _) in cases.items():
                measured = convert(folder, root / f"{folder.name}-hybrid")
                if run:  # the first round warms the disk cache
                    results[name].append(measured)
        print(f"hybridize {version('hybridize')}, Python {platform.python_version()}, {runs} runs")
        medians = {}
        for name, (folder, size) in cases.items():
            seconds, memory = (
                statistics.median(column) for column in zip(*results[name], strict=True)
            )
            medians[name] = seconds
            sources = {path.stat().st_ino for path in folder.glob("*.safetensors")}
            linked = {
                p.stat().st_ino for p in (root / f"{folder.name}-hybrid").glob("*.safetensors")
            }
            print(
                f"{name:>6}: {size / 1e9:8.3f} GB of weights, {seconds:.2f} s, {memory:.0f} MiB, "
                f"weights {'linked' if sources == linked else 'COPIED'}, "
                f"{allocated_bytes(root / f'{folder.name}-hybrid') / 1024:.0f} KiB on disk"
            )
        print(f" ratio: {medians['8 GB'] / medians['small']:.2f} (8 GB to small, of medians)")


if __name__ == "__main__":
    main()
