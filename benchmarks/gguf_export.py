"""What an export of a model of 1 GB costs: seconds and peak memory, against a copy of the file.

Random bfloat16 weights of Qwen3's shapes. The runs alternate, each a whole process: `cp` of the
weights, `hybridize export`, and llama.cpp's own converter when its folder is given (the source
distribution of llama-cpp-python on PyPI has it as vendor/llama.cpp). That one needs a tokenizer
whose hash it knows (--tokenizer: a folder, such as that of a Qwen3 model).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from converter.model.dimensions import read_shape
from converter.model.families import family_of

_DEMO = Path(__file__).parent / "demo-model"
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "torch_dtype": "bfloat16",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


def make_model(folder: Path, tokenizer: Path) -> int:
    """Write a random model; bytes of its weights.

    It runs in a process of its own: a child is charged with the memory of who starts it.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for path in tokenizer.glob("tokenizer*"):
        shutil.copy(path, folder)
    torch.manual_seed(0)
    shapes = family_of("qwen3", folder).expected_tensors(CONFIG, read_shape(CONFIG, folder))
    tensors = {
        name: torch.empty(size, dtype=torch.bfloat16).normal_(0.0, 0.02)
        for name, size in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(2 * math.prod(size) for size in shapes.values())


def measured(command: list[str]) -> tuple[float, float]:
    """Seconds and peak memory (MiB) of a process."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, errors.decode()[-2000:]
    return time.perf_counter() - started, usage.ru_maxrss / _PER_MIB


# Linux counts in KiB, macOS in bytes.
_PER_MIB = 1024 if sys.platform == "linux" else 1024**2


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokenizer", type=Path, default=_DEMO)
    parser.add_argument("--llama-cpp", type=Path, help="llama.cpp's folder, with its converter.")
    parser.add_argument("--types", default="bf16,f16,q8_0")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        source, hybrid = Path(temporary) / "source", Path(temporary) / "hybrid"
        if os.fork() == 0:
            make_model(source, given.tokenizer)
            os._exit(0)
        assert os.wait()[1] == 0
        weights = source / "model.safetensors"
        tool = [sys.executable, "-m", "converter"]
        layers = ["--layers", "3,7,11", "--window", "1024", "-q"]
        subprocess.run([*tool, "convert", str(source), str(hybrid), *layers], check=True)
        out = str(Path(temporary) / "out")
        cases = {"cp": ["cp", "--reflink=never", str(weights), out]}
        if sys.platform != "linux":
            cases["cp"] = ["cp", str(weights), out]
        for kind in given.types.split(","):
            cases[f"export {kind}"] = [
                *tool, "export", str(hybrid), out, "--type", kind, "--force", "-q",
            ]  # fmt: skip
        if given.llama_cpp is not None:
            script = str(given.llama_cpp / "convert_hf_to_gguf.py")
            for kind in given.types.split(","):
                cases[f"llama.cpp {kind}"] = [
                    sys.executable, script, str(source), "--outfile", out, "--outtype", kind,
                ]  # fmt: skip
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
        for run in range(given.runs + 1):
            for name, command in cases.items():
                found = measured(command)
                if run:  # the first round warms the disk cache
                    results[name].append(found)
        print(
            f"hybridize {version('hybridize')}, gguf {version('gguf')}, "
            f"Python {platform.python_version()}, {weights.stat().st_size / 1e9:.3f} GB of "
            f"weights, {given.runs} runs"
        )
        medians = {
            name: [statistics.median(column) for column in zip(*rows, strict=True)]
            for name, rows in results.items()
        }
        copied = medians["cp"][0]
        for name, (seconds, memory) in medians.items():
            print(f"{name:>16}: {seconds:6.2f} s, {memory:7.1f} MiB, {seconds / copied:5.2f} of cp")
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _PER_MIB
    print(f"(nothing below {own:.0f} MiB can be seen: the size of this process)")


if __name__ == "__main__":
    main()
