"""Scoring a model that is four times as large as the memory allowed, by the kernel, to the process.

Writes a random Qwen3 of about 4 GB in float32, scores it (restore-one, every layer, exact) once in
memory and once within a quarter of its size, each in a process of its own, and compares the scores
and the times.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from memory_limit import limited_group, peak_of
from peak_memory import peak_mib

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "torch_dtype": "float32",
    "hidden_size": 1408,
    "intermediate_size": 5632,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 88,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
    "max_window_layers": 32,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}
PROMPT, ANSWER, WINDOW, EXAMPLES = 96, 4, 16, 2


def write_model(folder: Path, config: dict[str, Any] = CONFIG) -> int:
    """Write random weights, a shard for each layer; their bytes."""
    import torch
    from safetensors.torch import save_file

    from converter.model.dimensions import read_shape
    from converter.model.families import family_of

    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    family = family_of("qwen3", folder)
    expected = family.expected_tensors(config, read_shape(config, folder))
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in expected.items():
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        shards.setdefault(f"model-{part}.safetensors", {})[name] = shape
    torch.manual_seed(0)
    total, home = 0, dict[str, str]()
    for shard, shapes in shards.items():
        tensors = {
            name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * 0.03
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        home |= dict.fromkeys(tensors, shard)
        total += sum(4 * tensor.numel() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": home}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def score(folder: Path, work: Path, memory_bytes: int | None) -> None:
    """The body of a measured process: score and print scores, seconds, peak memory as JSON."""
    from contextlib import nullcontext

    from converter.calibration.calibrate import CalibrationTask, calibrate
    from converter.calibration.data.examples import Examples
    from converter.calibration.distributed import ALONE
    from converter.calibration.run import CalibrationRun
    from converter.calibration.selectors.one_layer import NLL_RESTORE
    from converter.inference.example import Example
    from converter.inference.load import Placement
    from converter.model.mask import Mask
    from converter.model.source import open_source

    class NoBar:
        def advance(self, amount: float) -> None:
            """Nobody is looking."""

        def expect(self, amount: float) -> None:
            """Nobody is looking."""

    draw = random.Random(0)  # noqa: S311 - reproducible, not a secret
    examples = tuple(
        Example(
            tuple(draw.randrange(CONFIG["vocab_size"]) for _ in range(PROMPT)),
            tuple(draw.randrange(CONFIG["vocab_size"]) for _ in range(ANSWER)),
            "random",
        )
        for _ in range(EXAMPLES)
    )
    said: list[str] = []
    measurement = CalibrationRun(
        source=open_source(str(folder)),
        examples=Examples(examples, (), ()),
        mask=Mask(WINDOW),
        placement=Placement("cpu", "float32"),
        memory_bytes=memory_bytes,
        work=work,
        fresh=True,
        processes=ALONE,
        say=said.append,
        near_examples=dict,
    )
    started = time.perf_counter()
    scores = calibrate(
        measurement, CalibrationTask((NLL_RESTORE,), 1), lambda *_: nullcontext(NoBar())
    ).scores
    result = {
        "seconds": time.perf_counter() - started,
        "peak_mib": peak_mib(),
        "scores": [example.scores for example in scores.examples],
        "said": said,
    }
    print(json.dumps(result))


def run(folder: Path, work: Path, limit_bytes: int | None) -> dict[str, Any]:
    """One scoring in a process of its own, under the kernel's limit if there is one."""
    command = [sys.executable, __file__, "--child", str(folder), str(work)]
    command += [] if limit_bytes is None else [str(limit_bytes)]
    if limit_bytes is None:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found: dict[str, Any] = json.loads(done.stdout)
        return found
    with limited_group(limit_bytes) as group:
        if group is None:
            sys.exit("this machine lets us make no memory control group")
        inside = ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh", *command]
        done = subprocess.run(inside, check=False, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"exit status {done.returncode} within the limit:\n{done.stderr}")
        found = json.loads(done.stdout)
        return found | {"group_peak_mib": peak_of(group) / 1024**2}


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--child"]:
        folder, work, *limited = sys.argv[2:]
        score(Path(folder), Path(work), int(limited[0]) if limited else None)
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "model").mkdir()
        size = write_model(root / "model")
        limit = size // 4
        ways: dict[str, list[dict[str, Any]]] = {"in memory": [], "limited": []}
        for _ in range(runs):
            ways["in memory"].append(run(root / "model", root / "work", None))
            ways["limited"].append(run(root / "model", root / "work", limit))
        print(
            f"torch {version('torch')}, transformers {version('transformers')}, "
            f"Python {platform.python_version()}, {os.cpu_count()} cores, medians of {runs} "
            f"alternating runs; {CONFIG['num_hidden_layers']} layers, {size / 1e9:.2f} GB of "
            f"weights, {EXAMPLES} examples of {PROMPT + ANSWER} tokens, window {WINDOW}"
        )
        seconds = {name: statistics.median(r["seconds"] for r in got) for name, got in ways.items()}
        for name, results in ways.items():
            last = results[-1]
            print(
                f"  {name:9}: {seconds[name]:.1f} s, peak {last['peak_mib']:.0f} MiB resident"
                + (
                    f", {last['group_peak_mib']:.0f} MiB with page cache, of "
                    f"{limit / 1024**2:.0f} MiB allowed; {'; '.join(last['said'])}"
                    if name == "limited"
                    else ""
                )
            )
        pairs = [
            (a, b)
            for left, right in zip(*(r[-1]["scores"] for r in ways.values()), strict=True)
            for a, b in zip(left, right, strict=True)
        ]
        print(
            f"  limited takes {seconds['limited'] / seconds['in memory']:.2f} of the time in "
            f"memory; largest difference of a score {max(abs(a - b) for a, b in pairs):.1e}, "
            f"of scores up to {max(abs(a) for a, _ in pairs):.3f}"
        )


if __name__ == "__main__":
    main()
