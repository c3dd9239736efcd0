"""`make bench-gpu`, whole, at toy size: what it prints and writes is not tried first on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from converter.calibration.selectors import MEASURING

BENCH = Path(__file__).parent.parent / "benchmarks" / "bench_gpu.py"


def test_every_part_runs_at_toy_size(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    command = [sys.executable, str(BENCH), "--tiny", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    rows = {name: part["rows"] for name, part in result["parts"].items()}
    assert all(part["not done"] is None for part in result["parts"].values())
    assert not [row for part in rows.values() for row in part if "not done" in row]
    assert rows["tests"][0]["ok"] and rows["verify"][0]["ok"]
    lengths = {row["what"].partition(",")[2] for row in rows["speed"]}
    assert {f" {n} tokens, hybrid" for n in (64, 128)} < lengths
    assert {row["what"].split(", ")[-1] for row in rows["calibration"]} == set(MEASURING)
    lines = done.stdout.splitlines()
    assert sum(line.startswith("| ") for line in lines) == sum(map(len, rows.values())) + 6
