"""KV memory, prefill and decode speed of a hybrid in llama.cpp, against the model's stock GGUF.

Both files hold the same random weights in f16: the hybrid under the architecture that honours its
plan, the stock one under Qwen3's own, which runs full attention. Each round loads one file after
the other for each length, evaluates a random prompt and decodes some tokens after it.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from converter.cli import run
from converter.common.units import human_bytes
from converter.engines.gguf.hybrid_file import open_hybrid
from converter.engines.gguf.llama_cpp import LlamaCppModel, LlamaCppSettings, threads

_ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Measured:
    """One load of one file.

    Attributes:
        cache_bytes: keys and values that llama.cpp allocated.
        prefill_seconds: of the whole prompt.
        decode_seconds: of one token after it.
    """

    cache_bytes: float
    prefill_seconds: float
    decode_seconds: float


def make_files(folder: Path, given: argparse.Namespace) -> dict[str, Path]:
    """The two files of one random model."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=given.hidden,
        intermediate_size=3 * given.hidden,
        num_hidden_layers=given.layers,
        num_attention_heads=given.heads,
        num_key_value_heads=max(1, given.heads // 2),
        head_dim=64,
        vocab_size=998,
        max_position_embeddings=1 << 16,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    source, hybrid = folder / "source", folder / "hybrid"
    Qwen3ForCausalLM(config).save_pretrained(source)
    for path in (_ROOT / "benchmarks" / "demo-model").glob("tokenizer*"):
        (source / path.name).write_bytes(path.read_bytes())
    kept = ",".join(str(layer) for layer in range(given.layers) if layer % 4 == 3)
    options = ["--layers", kept, "--window", str(given.window), "-q", "--json"]
    assert run(["convert", str(source), str(hybrid), *options]) == 0
    files = {"hybrid": folder / "hybrid.gguf", "stock": folder / "stock.gguf"}
    for name, path in files.items():
        stock = ["--stock-arch"] if name == "stock" else []
        assert run(["export", str(hybrid), str(path), "--type", "f16", "-q", "--json", *stock]) == 0
    return files


def measure(path: Path, ids: list[int], new_tokens: int) -> Measured:
    """Load a file, read the prompt and decode."""
    settings = LlamaCppSettings(len(ids) + new_tokens + 1)
    with LlamaCppModel(path, settings) as engine:
        started = time.perf_counter()
        engine.feed(ids, [len(ids) - 1])
        prefilled = time.perf_counter()
        for token in range(new_tokens):
            engine.feed([token], [0])
        decoded = time.perf_counter()
        held = open_hybrid(path).cache_bytes(settings, engine.caches)
    return Measured(held, prefilled - started, (decoded - prefilled) / new_tokens)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="8192,16384,32768")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=64)
    given = parser.parse_args()
    print(
        f"hybridize {version('hybridize')}, llama-cpp-python {version('llama-cpp-python')}, "
        f"Python {platform.python_version()}, {threads()} threads of {os.cpu_count()}; "
        f"{given.layers} layers (every fourth full), hidden {given.hidden}, {given.heads} heads of "
        f"64, window {given.window}, {given.runs} runs",
        file=sys.stderr,
    )
    generator = random.Random(0)  # noqa: S311 - a prompt, not a secret
    with tempfile.TemporaryDirectory() as temporary:
        files = make_files(Path(temporary), given)
        for length in map(int, given.lengths.split(",")):
            ids = [generator.randrange(990) for _ in range(length)]
            rounds: dict[str, list[Measured]] = {name: [] for name in files}
            for _ in range(given.runs):
                for name, path in files.items():
                    rounds[name].append(measure(path, ids, given.new_tokens))
            show(length, rounds)


def show(length: int, rounds: dict[str, list[Measured]]) -> None:
    """Medians of both files, and what the hybrid takes of the stock one's."""
    medians = {
        name: (
            found[0].cache_bytes,
            statistics.median(one.prefill_seconds for one in found),
            statistics.median(one.decode_seconds for one in found),
        )
        for name, found in rounds.items()
    }
    for name, (held, prefill, decode) in medians.items():
        print(
            f"{length:>6} {name:>7}: KV cache {human_bytes(round(held)):>9}, "
            f"prefill {prefill:7.2f} s ({length / prefill:6.0f} tokens/s), "
            f"decode {1000 * decode:6.2f} ms a token",
            flush=True,
        )
    held, prefill, decode = (
        ours / theirs for ours, theirs in zip(medians["hybrid"], medians["stock"], strict=True)
    )
    print(
        f"{length:>6}   ratio: KV cache {held:.3f}, prefill time {prefill:.3f}, "
        f"decode time {decode:.3f} (hybrid to stock, of medians)",
        flush=True,
    )


if __name__ == "__main__":
    main()
