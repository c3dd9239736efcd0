"""Decoding and prefill of a plan of KV heads against a plan of layers with the same KV bytes.

A random Qwen3 (8 layers, width 1024, 16:8 heads of 64) with a window of 512, in the code that
ships. The layer plan has 2 full layers; the head plan has as many full KV heads, 2 in each layer.
The two take turns, and medians are compared; the original, full in every layer, goes along. Time is
the processor's, on one thread, so that other work on the machine counts little. Prints for each
length the ratios, and the KV bytes that the caches held against the formula.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from converter.checkpoint.writer import write_model
from converter.inference.generate import cache_bytes
from converter.model.mask import FULL, SLIDING, Mask
from converter.model.source import open_source
from converter.plan.plan import Plan

LAYERS, KV_HEADS, HEAD_DIM, WINDOW = 8, 8, 64, 512
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": 1024,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
# Full KV heads of each layer: those in a row are views, those apart are copied.
PLANS = {
    "layers": (FULL, SLIDING, SLIDING, SLIDING) * 2,
    "heads": tuple(f"mixed_attention:{i % 4},{i % 4 + 4}" for i in range(LAYERS)),
    "original": (FULL,) * LAYERS,
}


def load(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """A model for each plan, by its name, in the code that ships."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **SIZES)).save_pretrained(folder)
    source, models = open_source(str(folder)), {}
    for name, kinds in PLANS.items():
        out = folder / name
        out.mkdir()
        write_model(source, Plan(kinds, Mask(WINDOW), "hand", None, None, "random", None), out)
        model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=dtype)
        models[name] = model.eval()
    return models


def promised_bytes(tokens: int, itemsize: int) -> int:
    """KV bytes of both hybrids behind so many tokens: the sum over KV heads."""
    full = 2 * KV_HEADS
    held = full * tokens + (LAYERS * KV_HEADS - full) * (WINDOW - 1)
    return 2 * held * HEAD_DIM * itemsize


@torch.inference_mode()
def measure(models: dict[str, Any], tokens: int, runs: int, decoded: int) -> None:
    """Print the ratios at one length."""
    prompt, token = torch.randint(0, 1000, (1, tokens)), torch.tensor([[7]])
    prefill: dict[str, list[float]] = {name: [] for name in models}
    step: dict[str, list[float]] = {name: [] for name in models}
    held = {}
    for _ in range(runs):
        caches = {}
        for name, model in models.items():
            started = time.process_time()
            caches[name] = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
            prefill[name].append(time.process_time() - started)
            held[name] = cache_bytes(caches[name])
        for _ in range(decoded):
            for name, model in models.items():
                started = time.process_time()
                model(token, past_key_values=caches[name], use_cache=True)
                step[name].append(time.process_time() - started)
    dtype = next(iter(models.values())).dtype
    before, each = ({n: statistics.median(t) for n, t in s.items()} for s in (prefill, step))
    same = held["heads"] == held["layers"] == promised_bytes(tokens, dtype.itemsize)
    print(
        f"{tokens:6} tokens {str(dtype).removeprefix('torch.'):8}: heads take "
        f"{before['heads'] / before['layers']:.2f}x the layers' time to prefill and "
        f"{each['heads'] / each['layers']:.2f}x to decode (the original "
        f"{before['original'] / before['layers']:.2f}x and "
        f"{each['original'] / each['layers']:.2f}x); {before['layers']:.2f} s and "
        f"{each['layers'] * 1000:.1f} ms with layers; KV {held['heads'] / 2**20:.1f} MiB of "
        f"{held['original'] / 2**20:.1f}, {'as' if same else 'NOT as'} the layers and the formula",
        flush=True,
    )


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--decoded", type=int, default=24, help="tokens after each prefill")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python "
        f"{platform.python_version()}, 1 thread, window {WINDOW}, medians of "
        f"{asked.runs} alternating prefills and {asked.runs * asked.decoded} alternating steps, "
        f"sizes {SIZES}"
    )
    for dtype in asked.dtypes:
        with tempfile.TemporaryDirectory() as temporary:
            models = load(Path(temporary) / "model", getattr(torch, dtype))
            for tokens in asked.lengths:
                measure(models, tokens, asked.runs, asked.decoded)


if __name__ == "__main__":
    main()
