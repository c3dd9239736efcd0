"""Seconds of `hybridize calibrate` at 36 layers, by this checkout and by another one.

    python benchmarks/calibrate_time.py OTHER_CHECKOUT

Both choose 9 of 36 layers of a narrow model with random weights, by their default method, in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
LAYERS, WIDTH = 36, 64
OPTIONS = ["--budget", "1/4", "--window", "16", "--length", "256", "--device", "cpu", "-q"]


def write_model(folder: Path) -> None:
    """A Qwen3 with random weights and the demonstration model's tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    demo = json.loads((HERE / "demo-model" / "config.json").read_text())
    config = Qwen3Config(
        vocab_size=demo["vocab_size"],
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=WIDTH // 2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(HERE / "demo-model" / name, folder / name)


def seconds(checkout: Path, model: Path, out: Path, samples: int) -> tuple[float, float]:
    """Of one whole process; and the layer-forwards that its scores file tells of."""
    command = [sys.executable, "-m", "converter", "calibrate", str(model), *OPTIONS]
    command += ["--samples", str(samples), "--out", str(out), "--force", "--fresh"]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    started = time.perf_counter()
    subprocess.run(command, check=True, env=environment, cwd=checkout, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started, json.loads(out.read_text())["layer_forwards"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    options = parser.parse_args()
    checkouts = {"this": HERE.parent, "other": options.other.resolve()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary) / "model"
        write_model(model)
        for _ in range(options.runs):
            for name, checkout in checkouts.items():
                out = Path(temporary) / f"{name}.json"
                found[name].append(seconds(checkout, model, out, options.samples))
    print(
        f"torch {version('torch')}, Python {platform.python_version()}, {LAYERS} layers of width "
        f"{WIDTH}, {options.samples} examples of 256 tokens, window 16, {options.runs} runs"
    )
    naive = options.samples * LAYERS * (LAYERS + 1)
    medians = {name: statistics.median(run[0] for run in runs) for name, runs in found.items()}
    for name, runs in found.items():
        share = runs[0][1] / naive
        print(f"{name:>6}: {medians[name]:.1f} s; choosing took {share:.2f} of naive")
    print(f" ratio: {medians['this'] / medians['other']:.2f} (this to the other, of medians)")


if __name__ == "__main__":
    main()
