"""How an evaluation looks on a terminal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converter.cli.console import Console
from converter.common.statistics import Estimate
from converter.common.units import human_bytes
from converter.evaluation.models import HYBRID, ORIGINAL
from converter.evaluation.report import PAGE
from converter.evaluation.summary import accuracy_text, difference_text

Variants = Mapping[str, Mapping[str, Any]]


def show_evaluation(console: Console, folder: Path, summary: Mapping[str, Any]) -> int:
    """Print an evaluation and where its report is; the exit status."""
    for reason, count in summary["dropped"].items():
        console.say(f"rows left out: {count} ({reason})")
    short = {key: value for key, value in summary.items() if key != "items"}
    console.result(short, lambda: _show_tables(console, summary))
    console.say(f"report: {folder / PAGE}")
    short_context = summary["short_context"]
    if short_context is None or short_context["ok"]:
        return 0
    console.say("FAILED: a plan differs from the original within the window")
    return 1


def _show_tables(console: Console, summary: Mapping[str, Any]) -> None:
    variants: Variants = summary["variants"]
    original = variants[ORIGINAL]
    for task in summary["tasks"]:
        console.print(f"{task}: accuracy [95% interval], paired difference to the original")
        rows: list[tuple[object, ...]] = []
        for name, variant in variants.items():
            found = variant["tasks"][task]
            change = difference_text(found["difference"])
            rows.append((name, accuracy_text(found), change, found["n"]))
        console.table(("", "accuracy", "difference", "n"), rows)
    _show_heatmaps(console, variants)
    if summary["tasks"]:
        console.print("on the answers' tokens (nats per token, ± standard error)")
        rows = []
        for name, variant in variants.items():
            found, flips = variant["answers"], variant["answers"]["flips"]
            keys = ("nll", "nll_above_original", "kl", "agreement")
            means = [Estimate(**found[key]) for key in keys]
            rows.append((name, *means, f"{flips['lost']} of {flips['tokens']}", flips["won"]))
        columns = ("loss", "above the original", "KL from it", "same top token", "lost", "won")
        console.table(("", *columns), rows)
    if summary["perplexity"] is not None:
        text = original["text"]
        console.print(f"on {text['chunks']} chunks of {text['chunk_tokens']} tokens of text")
        keys = ("perplexity", "nll_above_original", "kl", "agreement")
        console.table(
            ("", "perplexity", "loss above the original", "KL from it", "same top token"),
            [
                (name, *(Estimate(**variant["text"][key]) for key in keys))
                for name, variant in variants.items()
            ],
        )
    for task in original["harness"]:
        console.print(f"lm-eval {task} (± standard error)")
        rows = []
        for name, variant in variants.items():
            found = variant["harness"][task]
            for metric, value in found["metrics"].items():
                change = difference_text(found["differences"].get(metric))
                rows.append((name, metric, Estimate(value["value"], value["stderr"]), change))
        console.table(("", "metric", "value", "difference"), rows)
    _show_cost(console, variants)
    for finding in summary["findings"]:
        console.print(finding)


def _show_heatmaps(console: Console, variants: Variants) -> None:
    """Accuracy by length and depth, of the original and of the plan it is about."""
    for task in variants[ORIGINAL]["heatmaps"]:
        for name in [name for name in (ORIGINAL, HYBRID) if name in variants]:
            cells = variants[name]["heatmaps"][task]
            depths = sorted({cell["depth"] for cell in cells})
            by_length: dict[int, dict[float, str]] = defaultdict(dict)
            for cell in cells:
                by_length[cell["length_tokens"]][cell["depth"]] = f"{cell['accuracy']:.2f}"
            least = min(cell["n"] for cell in cells)
            console.print(
                f"{task}, {name}: right answers by length and depth of the evidence "
                f"({least} or more each)"
            )
            console.table(
                ("tokens", *(f"{depth:.0%}" for depth in depths)),
                [
                    (length, *(shown.get(depth, "") for depth in depths))
                    for length, shown in sorted(by_length.items())
                ],
            )


def _show_cost(console: Console, variants: Variants) -> None:
    tokens = variants[ORIGINAL]["cost"][-1]["context_tokens"]
    console.print(f"cost at {tokens:,} tokens by formula; speed as measured, medians")
    rows = []
    for name, variant in variants.items():
        cost, speed = variant["cost"][-1], variant["speed"]
        prefill = decode = ""
        if speed is not None:
            prefill = f"{speed['prompt_tokens'] / speed['prefill_seconds']:,.0f}"
            decode = f"{1 / speed['decode_seconds_per_token']:,.1f}"
        flop = f"{cost['prefill_flop'] / 1e9:,.3f}"
        rows.append((name, human_bytes(cost["kv_bytes"]), flop, prefill, decode))
    console.table(("", "KV cache", "prefill GFLOP", "prefill tokens/s", "decode tokens/s"), rows)
