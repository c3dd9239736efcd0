"""One layer's attention, in the code that ships and in that of another checkout, on the CPU.

Give the other checkout's `templates` folder. Both take the same random states in turn, and medians
are compared. Also prints how many kernel calls each took, and how far apart they are.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

HEADS, KV_HEADS, HEAD_DIM, WINDOW, SINKS = 8, 2, 64, 512, 4
OURS = Path(__file__).parent.parent / "templates"


class CountCalls(TorchFunctionMode):
    """Counts calls of torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        self.calls += function is torch.nn.functional.scaled_dot_product_attention
        return function(*arguments, **(options or {}))


def load(folder: Path, package: str, sinks: int) -> ModuleType:
    """The modeling file of a templates folder for a mask with so many sinks."""
    if package not in sys.modules:
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [str(folder)]
    masks = sinks and (folder / "modeling_masks.py").exists()
    return importlib.import_module(f"{package}.modeling_{'masks' if masks else 'hybrid'}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path, help="templates folder of another checkout")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--prefix", type=int, default=2048, help="rows that come from a cache")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"torch {torch.__version__}, {options.threads} threads, {HEADS}:{KV_HEADS} heads of "
        f"{HEAD_DIM}, window {WINDOW}, medians of {options.runs} alternating runs"
    )
    for tokens in options.tokens:
        for kind, sinks, first in (
            ("sliding_attention", 0, 0),
            ("sliding_attention", SINKS, 0),
            ("sliding_attention", 0, options.prefix),
            ("full_attention", 0, options.prefix),
        ):
            for dtype in (torch.float32, torch.bfloat16):
                compare(options, tokens, kind, sinks, first, dtype)


def compare(
    options: Any, tokens: int, kind: str, sinks: int, first: int, dtype: torch.dtype
) -> None:
    """Measure and print one case."""
    mask = {"window_tokens": WINDOW, "sink_tokens": sinks, "full_attention_decode": False}
    config = SimpleNamespace(hybrid={"mask": mask}, layer_types=[kind])
    layer = SimpleNamespace(layer_idx=0, config=config)
    torch.manual_seed(0)
    query = torch.randn(1, tokens - first, HEADS, HEAD_DIM).to(dtype).transpose(1, 2)
    key, value = (torch.randn(1, tokens, KV_HEADS, HEAD_DIM).to(dtype).transpose(1, 2),) * 2
    codes = {
        "before": load(options.before, "before", sinks),
        "ours": load(OURS, "ours", sinks),
    }
    seconds: dict[str, list[float]] = {name: [] for name in codes}
    calls, outputs = {}, {}
    for _ in range(options.runs):
        for name, code in codes.items():
            with torch.inference_mode(), CountCalls() as counted:
                started = time.perf_counter()
                found = code.hybrid_attention(layer, query, key, value, code.Rows(first))[0]
                seconds[name].append(time.perf_counter() - started)
            calls[name], outputs[name] = counted.calls, found.float()
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    apart = float((outputs["ours"] - outputs["before"]).abs().max())
    print(
        f"{tokens:6} tokens, {first:4} of them before, {str(dtype)[6:]:8} {kind[:7]}, "
        f"{sinks} sinks: {medians['before'] / medians['ours']:5.2f}x the speed, "
        f"{calls['ours']} calls instead of {calls['before']}; "
        f"{medians['ours'] * 1e3:.0f} ms against {medians['before'] * 1e3:.0f} ms; "
        f"apart by {apart:.1e}",
        flush=True,
    )


if __name__ == "__main__":
    main()
