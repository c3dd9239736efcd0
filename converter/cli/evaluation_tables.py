"""How an evaluation looks on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converter.cli.console import Console
from converter.common.statistics import Estimate
from converter.common.units import human_bytes


def show_evaluation(console: Console, summary: Mapping[str, Any]) -> None:
    """Accuracy, answers, language, cost and speed of every variant, and what they say."""
    variants: Mapping[str, Mapping[str, Any]] = summary["variants"]
    names = list(variants)
    for task in summary["tasks"]:
        console.print(f"{task}: accuracy [95% interval], paired difference to the original")
        console.table(
            ("", "accuracy", "difference", "n"),
            [_accuracy_row(name, variants[name]["tasks"][task]) for name in names],
        )
    _show_heatmaps(console, variants)
    if summary["tasks"]:
        console.print("on the answers' tokens (nats per token, ± standard error)")
        console.table(
            ("", "loss", "above the original", "KL from it", "same top token", "lost", "won"),
            [_answer_row(name, variants[name]["answers"]) for name in names],
        )
    if summary["perplexity"] is not None:
        text = variants[names[0]]["text"]
        console.print(f"on {text['chunks']} chunks of {text['chunk_tokens']} tokens of text")
        console.table(
            ("", "perplexity", "loss above the original", "KL from it", "same top token"),
            [_text_row(name, variants[name]["text"]) for name in names],
        )
    for task in variants[names[0]]["harness"]:
        console.print(f"lm-eval {task} (± standard error)")
        console.table(("", "metric", "value", "difference"), _harness_rows(variants, task))
    _show_cost(console, variants)
    for finding in summary["findings"]:
        console.print(finding)


def _estimate(value: Mapping[str, Any]) -> Estimate:
    return Estimate(value["mean"], value["stderr"])


def _change(change: Mapping[str, Any] | None) -> str:
    """A paired difference with its interval; nothing for the original itself."""
    if change is None:
        return ""
    return f"{change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"


def _accuracy_row(name: str, found: Mapping[str, Any]) -> tuple[object, ...]:
    change = found["difference"]
    return (
        name,
        f"{found['accuracy']:.3f} [{found['low']:.3f}, {found['high']:.3f}]",
        _change(change),
        found["n"],
    )


def _answer_row(name: str, found: Mapping[str, Any]) -> tuple[object, ...]:
    flips = found["flips"]
    return (
        name,
        _estimate(found["nll"]),
        _estimate(found["nll_above_original"]),
        _estimate(found["kl"]),
        _estimate(found["agreement"]),
        f"{flips['lost']} of {flips['tokens']}",
        flips["won"],
    )


def _text_row(name: str, found: Mapping[str, Any]) -> tuple[object, ...]:
    return (
        name,
        _estimate(found["perplexity"]),
        _estimate(found["nll_above_original"]),
        _estimate(found["kl"]),
        _estimate(found["agreement"]),
    )


def _harness_rows(variants: Mapping[str, Mapping[str, Any]], task: str) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for name, variant in variants.items():
        found = variant["harness"][task]
        for metric, value in found["metrics"].items():
            change = found["differences"].get(metric)
            rows.append(
                (
                    name,
                    metric,
                    Estimate(value["value"], value["stderr"]),
                    _change(change),
                )
            )
    return rows


def _show_heatmaps(console: Console, variants: Mapping[str, Mapping[str, Any]]) -> None:
    """Accuracy by length and depth, of the original and of the plan it is about."""
    original = next(iter(variants))
    shown = [name for name in (original, "hybrid") if name in variants]
    for task in variants[original]["heatmaps"]:
        for name in shown:
            cells = variants[name]["heatmaps"][task]
            depths = sorted({cell["depth"] for cell in cells})
            lengths = sorted({cell["length_tokens"] for cell in cells})
            found = {(c["length_tokens"], c["depth"]): c for c in cells}
            least = min(cell["n"] for cell in cells)
            console.print(
                f"{task}, {name}: right answers by length and depth of the evidence "
                f"({least} or more each)"
            )
            console.table(
                ("tokens", *(f"{depth:.0%}" for depth in depths)),
                [
                    (
                        length,
                        *(
                            f"{found[length, depth]['accuracy']:.2f}"
                            if (length, depth) in found
                            else ""
                            for depth in depths
                        ),
                    )
                    for length in lengths
                ],
            )


def _show_cost(console: Console, variants: Mapping[str, Mapping[str, Any]]) -> None:
    last = {name: variant["cost"][-1] for name, variant in variants.items()}
    tokens = next(iter(last.values()))["context_tokens"]
    console.print(f"cost at {tokens:,} tokens by formula; speed as measured, medians")
    rows = []
    for name, cost in last.items():
        speed = variants[name]["speed"]
        rows.append(
            (
                name,
                human_bytes(cost["kv_bytes"]),
                f"{cost['prefill_flop'] / 1e9:,.3f}",
                ""
                if speed is None
                else f"{speed['prompt_tokens'] / speed['prefill_seconds']:,.0f}",
                "" if speed is None else f"{1 / speed['decode_seconds_per_token']:,.1f}",
            )
        )
    console.table(("", "KV cache", "prefill GFLOP", "prefill tokens/s", "decode tokens/s"), rows)
