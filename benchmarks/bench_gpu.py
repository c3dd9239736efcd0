"""What only a GPU can show, in under ten minutes: tests, speed, calibration, proof.

    make bench-gpu
    python benchmarks/bench_gpu.py [--tiny] [--out bench-gpu.json]

Writes random models of Qwen3-4B's and 8B's shapes (bfloat16, 25 GB of disk), converts them by a
plan of one full layer in four and a window of 2048, and

- runs the tests marked `cuda`: masks and gradients against brute force, every family's proof;
- times prefill and decoding of the hybrid against full attention and transformers' own code (sdpa,
  and flash attention where it is installed), over the same weights, in turn;
- scores layers by each method on one example of 16,384 tokens: seconds and peak memory;
- proves the checkpoints.

Each part is a process with a limit of time. What it has not done by then, and what found no memory,
is recorded as not done. Prints one table, writes one JSON. `--tiny` takes toy sizes, on any device.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gpu_parts import PARTS, REAL, TOY, Bench

# Seconds; nine minutes and a half together. Toy sizes are for machines of any speed.
LIMITS = {"models": 75, "tests": 120, "speed": 190, "calibration": 105, "verify": 80}
_TOY_LIMIT = 600
# A part that looks at the time stops so long before it is stopped.
_SLACK = 3.0


def main() -> int:
    """Run every part, print the table, write the JSON; 1 if a check or a whole part failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="toy sizes, on any device")
    parser.add_argument("--out", type=Path, default=Path("bench-gpu.json"))
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        print("there is no CUDA device here; --tiny runs every part at toy size", file=sys.stderr)
        return 2
    if options.part:
        run_part(options.part, options.root, device, tiny=options.tiny)
        return 0
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as root:
        parts = {name: started_part(name, Path(root), tiny=options.tiny) for name in PARTS}
    result = {"machine": machine(device), "tiny": options.tiny, "parts": parts}
    result["seconds"] = round(time.perf_counter() - started, 1)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(result))
    wrong = [row for part in parts.values() for row in part["rows"] if row.get("ok") is False]
    broken = [name for name, part in parts.items() if "exit status" in (part["not done"] or "")]
    return 1 if wrong or broken else 0


def machine(device: str) -> dict[str, Any]:
    """What the figures were taken on."""
    names = ("torch", "transformers", "flash-attn")
    found: dict[str, Any] = {"device": device, "python": platform.python_version()}
    for name in names:
        with contextlib.suppress(ModuleNotFoundError):
            found[name] = version(name)
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "memory GB": round(properties.total_memory / 1e9, 1)}
    return found


def limit_of(name: str, *, tiny: bool) -> int:
    """Seconds after which a part is stopped."""
    return _TOY_LIMIT if tiny else LIMITS[name]


def run_part(name: str, root: Path, device: str, *, tiny: bool) -> None:
    """The body of a part's process: its rows as lines of JSON."""
    ends = time.monotonic() + limit_of(name, tiny=tiny) - _SLACK
    bench = Bench(TOY if tiny else REAL, root, device, ends)
    for row in PARTS[name](bench):
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        print(json.dumps(rounded), flush=True)


def started_part(name: str, root: Path, *, tiny: bool) -> dict[str, Any]:
    """A part's rows, its seconds, and why it is not done if it is not."""
    command = [sys.executable, __file__, "--part", name, "--root", str(root)]
    command += ["--tiny"] if tiny else []
    started, limit, why = time.perf_counter(), limit_of(name, tiny=tiny), None
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=said, stderr=errors, start_new_session=True)
        try:
            if status := process.wait(limit):
                errors.seek(0)
                last = (errors.read().strip().splitlines() or [""])[-1]
                why = f"exit status {status}: {last}"
        except subprocess.TimeoutExpired:
            # With what it has started.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            why = f"stopped after {limit} s"
        said.seek(0)
        rows = [json.loads(line) for line in said if line.startswith("{")]
    return {"seconds": round(time.perf_counter() - started, 1), "not done": why, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """Every row of every part, in Markdown."""
    told = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    lines = [told, "", "| part | what | figures |", "|---|---|---|"]
    for name, part in result["parts"].items():
        for row in part["rows"]:
            figures = {k: v for k, v in row.items() if k != "what" and v is not None}
            text = ", ".join(f"{key} {shown(value)}" for key, value in figures.items())
            lines.append(f"| {name} | {row['what']} | {text} |")
        why = f"NOT DONE: {part['not done']}" if part["not done"] else "done"
        lines.append(f"| {name} | {part['seconds']} s | {why} |")
    return "\n".join([*lines, "", f"{result['seconds']} s in all"])


def shown(value: Any) -> str:
    """A figure to three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
