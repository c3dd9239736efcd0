"""Perplexity of quantised GGUF files against float32, in llama.cpp, for trained models.

Converts each model to a plain-window hybrid, exports it in every type and measures the loss of the
same texts, evenly spread stretches of a file. The error is that of the mean difference to float32
over stretches.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy
from tokenizers import Tokenizer

from converter.cli import run
from converter.engines.gguf.llama_cpp import LlamaCppModel, LlamaCppSettings

TYPES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m", "q2_k")


def stretches(model: Path, text: Path, count: int, length: int) -> list[list[int]]:
    """Token ids of evenly spread stretches of a text, each beginning with the first token."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    whole = text.read_text(encoding="utf-8").replace("\r\n", "\n").replace("<|endoftext|>", "\n")
    step = len(whole) // count
    return [
        tokenizer.encode(whole[i * step : i * step + 8 * length]).ids[:length] for i in range(count)
    ]


def losses(file: Path, texts: list[list[int]]) -> list[float]:
    """Mean loss of each text in nats per token."""
    found = []
    with LlamaCppModel(file, LlamaCppSettings(max(map(len, texts)))) as engine:
        for ids in texts:
            engine.clear()
            logits = engine.feed(ids, range(len(ids))).astype(numpy.float64)
            logits -= logits.max(axis=1, keepdims=True)
            sums = numpy.log(numpy.exp(logits).sum(axis=1))
            found.append(float((sums[:-1] - logits[range(len(ids) - 1), ids[1:]]).mean()))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, action="append", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--layers", default="1,3")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--stretches", type=int, default=60)
    parser.add_argument("--length", type=int, default=480)
    given = parser.parse_args()
    print(
        f"hybridize {version('hybridize')}, llama-cpp-python {version('llama-cpp-python')}, "
        f"Python {platform.python_version()}, window {given.window}, "
        f"{given.stretches} stretches of {given.length} tokens of {given.text.name}"
    )
    with tempfile.TemporaryDirectory() as temporary:
        for model in given.model:
            hybrid = Path(temporary) / model.name
            options = ["--layers", given.layers, "--window", str(given.window), "-q", "--json"]
            assert run(["convert", str(model), str(hybrid), *options]) == 0
            texts = stretches(model, given.text, given.stretches, given.length)
            exact: list[float] = []
            for kind in TYPES:
                file = Path(temporary) / f"{model.name}-{kind}.gguf"
                assert run(["export", str(hybrid), str(file), "--type", kind, "-q", "--json"]) == 0
                found = losses(file, texts)
                exact = exact or found
                apart = [a - b for a, b in zip(found, exact, strict=True)]
                error = statistics.stdev(apart) / math.sqrt(len(apart))
                perplexity = math.exp(statistics.mean(found))
                print(
                    f"{model.name:>20} {kind:>7}: {file.stat().st_size / 2**20:6.2f} MiB, "
                    f"perplexity {perplexity:.4f}, loss above f32 "
                    f"{statistics.mean(apart):+.5f} ± {error:.5f}"
                )


if __name__ == "__main__":
    main()
