"""Converting by a given plan only links and writes: a model of 8 GB costs no memory and no disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.sparse_model import QWEN3_4B, write_sparse_model
from tests.conftest import make_tokenizer

# A process's peak begins with that of the one it was forked from: measure from a small one.
MEASURED = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
process.returncode = os.waitstatus_to_exitcode(status)
print(json.dumps({"peak_bytes": usage.ru_maxrss * 1024}))
sys.exit(process.returncode)
"""


def disk_bytes(folder: Path) -> int:
    """Bytes of disk that a folder's files occupy, each file once."""
    found = (path.stat() for path in folder.rglob("*") if path.is_file())
    return 512 * sum({status.st_ino: status.st_blocks for status in found}.values())


def test_a_model_of_8_gb_is_converted_without_reading_its_weights(tmp_path: Path) -> None:
    source, out = tmp_path / "big", tmp_path / "out"
    source.mkdir()
    assert write_sparse_model(source, QWEN3_4B, shards=1) > 8e9
    make_tokenizer(source)
    before = disk_bytes(tmp_path)
    options = ("--layers", "3,7,11,15,19", "--window", "512", "--json", "-q")
    command = (sys.executable, "-m", "converter", "convert", str(source), str(out), *options)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    printed, measured = map(json.loads, done.stdout.splitlines())
    (shard,) = source.glob("*.safetensors")
    assert printed["weights"] == {shard.name: "hard link"}
    assert (out / shard.name).samefile(shard)
    written = disk_bytes(tmp_path) - before
    assert measured["peak_bytes"] < 400e6
    assert written < 1 << 20
    kinds = json.loads((out / "config.json").read_text())["layer_types"]
    assert kinds.count("full_attention") == 5
