"""What `verify` takes of a random model of 1 GB: this version in turn with another one.

    python benchmarks/verify_cost.py OTHER_CHECKOUT [--layers 28] [--window 200] [--runs 3]

Each version converts the model by a given plan (its weights are hard links) and proves the
checkpoint against the source, in float32, each run a whole process. Prints medians of seconds, of
seconds of CPU (which other work on the machine disturbs less) and of peak memory, and their ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

# As Qwen3-0.6B with a smaller vocabulary: 1.0 GB in bfloat16.
_SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "vocab_size": 64000,
    "tie_word_embeddings": True,
}
_RUN = """
import resource, sys
from converter.cli import run
status = run(sys.argv[1:])
used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
peak = max(one.ru_maxrss for one in used) // 1024
print(peak, sum(one.ru_utime + one.ru_stime for one in used), file=sys.stderr)
sys.exit(status)
"""


def write_model(folder: Path, layers: int) -> int:
    """A random Qwen3; the bytes of its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3", **_SIZES, num_hidden_layers=layers)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def command(tree: Path, *arguments: object) -> tuple[float, float, float, str]:
    """Of a version's command: seconds, those of CPU, its processes' larger peak in MiB, output."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _RUN, *map(str, arguments)],
        check=True,
        capture_output=True,
        text=True,
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
    )
    seconds = time.perf_counter() - started
    peak, cpu = map(float, done.stderr.splitlines()[-1].split())
    return seconds, cpu, peak, done.stdout


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path, metavar="OTHER_CHECKOUT")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--window", type=int, default=200)
    options = parser.parse_args()
    trees = {"other": options.other.resolve(), "this": Path(__file__).resolve().parent.parent}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        size = write_model(root / "model", options.layers)
        full = ",".join(map(str, range(3, options.layers, 4)))
        plan = ("--layers", full, "--window", options.window)
        outs = {name: root / f"out-{name}" for name in trees}
        for name, tree in trees.items():
            command(tree, "convert", root / "model", outs[name], *plan, "-q")
        results: dict[str, list[tuple[float, ...]]] = {name: [] for name in trees}
        for _ in range(options.runs):
            for name, tree in trees.items():
                proof = ("--against", root / "model", "--dtype", "float32", "--json", "-q")
                *figures, told = command(tree, "verify", outs[name], *proof)
                assert json.loads(told)["ok"]
                results[name].append(tuple(figures))
    told = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    asked = f"{options.layers} layers, window {options.window}, {options.runs} runs"
    print(f"{size / 1e9:.2f} GB, {asked}, Python {platform.python_version()}, {told}")
    medians = {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in results.items()
    }
    for name, (seconds, cpu, peak) in medians.items():
        each = ", ".join(f"{one[0]:.1f}" for one in results[name])
        print(f"{name:>6}: {seconds:6.1f} s, {cpu:.1f} s of CPU, {peak:.0f} MiB (runs: {each} s)")
    ratios = [a / b for a, b in zip(medians["this"], medians["other"], strict=True)]
    told = "{:.2f} of seconds, {:.2f} of seconds of CPU, {:.2f} of memory".format(*ratios)
    print(f" ratio: {told} (this to the other, of medians)")


if __name__ == "__main__":
    main()
