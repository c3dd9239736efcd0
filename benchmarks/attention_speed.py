"""Speed and memory of a hybrid against the same model with full attention, on the CPU.

A random Qwen3 (4 layers, width 512, 8:2 heads of 64) with a window of 512 and one full layer in
four. Three models run the same tokens in turn, and medians are compared: the original (sdpa), the
hybrid in transformers' native code, and the hybrid in the code that ships. Prints, for each length,
dtype and number of threads: prefill ratios with the limit that arithmetic sets, decoding speed, KV
bytes against the formula, and the peak memory of a long prefill, each in a process of its own.

    python benchmarks/attention_speed.py --before CHECKOUT --tokens 16384

compares prefill alone, with the code that another checkout ships beside it.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from peak_memory import peak_mib
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from converter.checkpoint.writer import write_model
from converter.inference.generate import cache_bytes
from converter.model.mask import Mask
from converter.model.source import Source, open_source
from converter.plan.plan import Plan, kv_bytes, layer_types_of

LAYERS, WINDOW, HIDDEN, INTERMEDIATE = 4, 512, 512, 1536
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1024,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
PLANS = {"1/4": (1,), "all sliding": ()}
DECODED = 24


def plan_of(source: Source, full_layers: tuple[int, ...]) -> Plan:
    """A plan with the given full-attention layers."""
    kinds = layer_types_of(full_layers, LAYERS)
    return Plan(kinds, Mask(WINDOW), "layers", None, None, source.name, None)


def make_models(root: Path) -> Source:
    """Write the original and its hybrids under `root`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **SIZES))
    model.save_pretrained(root / "original")
    source = open_source(str(root / "original"))
    for name, layers in PLANS.items():
        folder = root / name.replace("/", "-")
        folder.mkdir()
        write_model(source, plan_of(source, layers), folder)
    return source


def make_before(root: Path, checkout: Path) -> None:
    """Write the hybrids once more, by another checkout's own command."""
    for name, layers in PLANS.items():
        folder = root / f"before-{name.replace('/', '-')}"
        asked = ["--layers", ",".join(map(str, layers)) or "none", "--window", str(WINDOW)]
        command = [sys.executable, "-m", "converter", "convert", f"{root}/original", f"{folder}"]
        subprocess.run(
            [*command, *asked, "--no-verify", "-q"],
            check=True,
            cwd=checkout,
            stdout=subprocess.DEVNULL,
        )


def load(root: Path, name: str, dtype: str) -> Any:
    """A model by its name: `original`, or `native`, `shipped` or `before` and a plan."""
    how, _, plan = name.partition(" ")
    written = f"{'before-' if how == 'before' else ''}{plan.replace('/', '-')}"
    model = AutoModelForCausalLM.from_pretrained(
        root / (written or "original"),
        dtype=getattr(torch, dtype),
        trust_remote_code=how in ("shipped", "before"),
    )
    return model.eval()


def speed_limit(tokens: int, full_layers: int) -> float:
    """How much faster arithmetic allows prefill to be: multiplications of both, as a ratio."""
    heads = SIZES["num_attention_heads"] * SIZES["head_dim"]
    kv = SIZES["num_key_value_heads"] * SIZES["head_dim"]
    linear = tokens * (HIDDEN * (2 * heads + 2 * kv) + 3 * HIDDEN * INTERMEDIATE)
    full = 2 * heads * tokens * (tokens + 1) // 2
    passed = max(tokens - WINDOW, 0)
    sliding = 2 * heads * (WINDOW * (WINDOW + 1) // 2 + passed * WINDOW)
    hybrid = LAYERS * linear + full_layers * full + (LAYERS - full_layers) * sliding
    return LAYERS * (linear + full) / hybrid


def prefill_seconds(model: Any, tokens: int) -> float:
    """Seconds of one forward pass over a prompt."""
    ids = torch.randint(0, 1000, (1, tokens))
    started = time.perf_counter()
    with torch.inference_mode():
        model(ids, use_cache=False, logits_to_keep=1)
    return time.perf_counter() - started


def decode(model: Any, cache: DynamicCache) -> float:
    """Tokens per second, one token at a time behind a filled cache."""
    token = torch.tensor([[7]])
    started = time.perf_counter()
    with torch.inference_mode():
        for _ in range(DECODED):
            model(token, past_key_values=cache, use_cache=True)
    return DECODED / (time.perf_counter() - started)


def medians(run: Any, names: list[str], runs: int) -> dict[str, float]:
    """The median of `run(name)` for each name, the names taking turns."""
    results: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(runs):
        for name in names:
            results[name].append(run(name))
    return {name: statistics.median(values) for name, values in results.items()}


def show_prefill(root: Path, dtype: str, lengths: list[int], native_up_to: int, runs: int) -> None:
    """Prefill of every model at every length."""
    hows = ("native", "shipped", *(["before"] if (root / "before-1-4").exists() else []))
    names = ["original", *(f"{how} {p}" for how in hows for p in PLANS)]
    models = {name: load(root, name, dtype) for name in names}
    for tokens in lengths:
        taken = [n for n in names if tokens <= native_up_to or not n.startswith("native")]
        seconds = medians(lambda n, t=tokens: prefill_seconds(models[n], t), taken, runs)
        for plan, layers in PLANS.items():
            shipped = seconds[f"shipped {plan}"]
            native, before = (seconds.get(f"{how} {plan}") for how in ("native", "before"))
            print(
                f"prefill {tokens:6} {dtype:8} {torch.get_num_threads()} threads, {plan:11}: "
                f"{seconds['original'] / shipped:5.2f}x the original's speed "
                f"(limit {speed_limit(tokens, len(layers)):5.2f}x)"
                + (f", {native / shipped:5.2f}x native code" if native else "")
                + (f", {before / shipped:5.2f}x the code before" if before else "")
                + f"; {shipped:.2f} s against {seconds['original']:.2f} s",
                flush=True,
            )


def show_decode(root: Path, source: Source, dtype: str, lengths: list[int], runs: int) -> None:
    """Decoding behind a long prompt, and the cache's bytes."""
    names = ["original", *(f"shipped {plan}" for plan in PLANS)]
    models = {name: load(root, name, dtype) for name in names}
    for tokens in lengths:
        caches = {}
        for name, model in models.items():
            ids = torch.randint(0, 1000, (1, tokens))
            with torch.inference_mode():
                filled = model(ids, use_cache=True, logits_to_keep=1).past_key_values
            caches[name] = filled
        held = {name: cache_bytes(cache) for name, cache in caches.items()}
        speeds = medians(lambda n, c=caches: decode(models[n], c[n]), names, runs)
        for plan, layers in PLANS.items():
            name = f"shipped {plan}"
            formula = kv_bytes(plan_of(source, layers), source.shape, tokens)["hybrid"]
            # The formula counts the current token, which the cache does not keep for next time.
            formula -= (LAYERS - len(layers)) * source.shape.kv_bytes_per_token
            formula = formula * models[name].dtype.itemsize // source.shape.kv_bytes_per_value
            print(
                f"decode  {tokens:6} {dtype:8} {torch.get_num_threads()} threads, {plan:11}: "
                f"{speeds[name] / speeds['original']:5.2f}x the original's speed, "
                f"{speeds[name]:.1f} against {speeds['original']:.1f} tokens/s; "
                f"KV {held[name] / 2**20:.2f} MiB against {held['original'] / 2**20:.2f} MiB, "
                f"{'equal to' if held[name] == formula else 'NOT'} the formula",
                flush=True,
            )


def prefill_peak(root: Path, name: str, dtype: str, tokens: int) -> float:
    """Peak memory of one prefill with a cache, in a process of its own."""
    command = [sys.executable, __file__, "--peak", str(root), name, dtype, str(tokens)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def measure_peak(root: str, name: str, dtype: str, tokens: str) -> None:
    """The body of that process."""
    model = load(Path(root), name, dtype)
    with torch.inference_mode():
        model(torch.randint(0, 1000, (1, int(tokens))), use_cache=True, logits_to_keep=1)
    print(peak_mib())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--native-up-to", type=int, default=8192, help="native code is slower")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--before", type=Path, help="another checkout; prefill alone")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if options.peak:
        measure_peak(*options.peak)
        return
    print(
        f"torch {torch.__version__}, transformers {version('transformers')}, "
        f"Python {platform.python_version()}, {os.cpu_count()} cores, window {WINDOW}, "
        f"medians of {options.runs} alternating runs, sizes {SIZES}"
    )
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        source = make_models(root)
        if options.before:
            make_before(root, options.before.resolve())
        for threads in options.threads:
            torch.set_num_threads(threads)
            for dtype in options.dtypes:
                show_prefill(root, dtype, options.tokens, options.native_up_to, options.runs)
                if options.before:
                    continue
                long = [tokens for tokens in options.tokens if tokens >= 16384]
                show_decode(root, source, dtype, long, options.runs)
        for dtype in () if options.before else options.dtypes:
            longest = max(options.tokens)
            peaks = {n: prefill_peak(root, n, dtype, longest) for n in ("original", "shipped 1/4")}
            print(
                f"peak of a {longest}-token prefill with cache, {dtype}: "
                f"{peaks['shipped 1/4']:.0f} MiB against {peaks['original']:.0f} MiB "
                f"({peaks['shipped 1/4'] / peaks['original']:.2f}x)",
                flush=True,
            )


if __name__ == "__main__":
    main()
