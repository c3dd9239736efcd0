"""What `verify` takes of a random model of 1 GB: this version in turn with another one.

    python benchmarks/verify_cost.py OTHER_CHECKOUT

Each version converts the model by a given plan (its weights are hard links) and proves the
checkpoint against the source, in float32, each run a whole process. Prints medians of seconds and
of peak memory, and their ratios.
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
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "vocab_size": 64000,
    "tie_word_embeddings": True,
}
_PLAN = ("--layers", "3,7,11,15,19,23,27", "--window", "64")
_RUN = """
import resource, sys
from converter.cli import run
status = run(sys.argv[1:])
whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
peaks = [resource.getrusage(who).ru_maxrss for who in whose]
print(max(peaks) // 1024, file=sys.stderr)
sys.exit(status)
"""


def write_model(folder: Path) -> int:
    """A random Qwen3; the bytes of its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3", **_SIZES)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def command(tree: Path, *arguments: object) -> tuple[float, float, str]:
    """Seconds, the larger peak of its processes in MiB, and the output of a version's command."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _RUN, *map(str, arguments)],
        check=True,
        capture_output=True,
        text=True,
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
    )
    return time.perf_counter() - started, float(done.stderr.splitlines()[-1]), done.stdout


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path, metavar="OTHER_CHECKOUT")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    trees = {"other": options.other.resolve(), "this": Path(__file__).resolve().parent.parent}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        size = write_model(root / "model")
        outs = {name: root / f"out-{name}" for name in trees}
        for name, tree in trees.items():
            command(tree, "convert", root / "model", outs[name], *_PLAN, "-q")
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in trees}
        for _ in range(options.runs):
            for name, tree in trees.items():
                proof = ("--against", root / "model", "--dtype", "float32", "--json", "-q")
                seconds, peak, told = command(tree, "verify", outs[name], *proof)
                assert json.loads(told)["ok"]
                results[name].append((seconds, peak))
    told = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    print(f"{size / 1e9:.2f} GB, {options.runs} runs, Python {platform.python_version()}, {told}")
    medians = {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in results.items()
    }
    for name, (seconds, peak) in medians.items():
        each = ", ".join(f"{one:.1f}" for one, _ in results[name])
        print(f"{name:>6}: {seconds:6.1f} s, {peak:.0f} MiB (runs: {each} s)")
    seconds, peak = (a / b for a, b in zip(medians["this"], medians["other"], strict=True))
    print(f" ratio: {seconds:.2f} of seconds, {peak:.2f} of memory (this to the other, of medians)")


if __name__ == "__main__":
    main()
