"""What the recorded evaluations have in common: running the command, and tables in Markdown."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from converter.common.statistics import Estimate

Summary = Mapping[str, Any]
Columns = Mapping[str, Callable[[Mapping[str, Any]], object]]


def hybridize(*arguments: object) -> str:
    """Run the command line in a process of its own; what it prints on stdout."""
    command = [sys.executable, "-m", "converter", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def evaluate(model: Path, out: Path, *options: object) -> Summary:
    """Evaluate a model, print the command and its findings, and give its JSON."""
    arguments = ["evaluate", model, *options, "--out", out, "--force"]
    started = time.perf_counter()
    summary: Summary = json.loads(hybridize(*arguments, "--json", "-q"))
    seconds = time.perf_counter() - started
    names = [a.name if isinstance(a, Path) else str(a) for a in arguments[:-3]]
    print(f"`hybridize {shlex.join(names)}`\n\n{seconds:.0f} s; {versions()}\n")
    for finding in summary["findings"]:
        print(f"- {finding}")
    return summary


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def estimates(part: str, **keys: str) -> Columns:
    """Columns of means with their errors: titles by the key that they have in a variant's part."""
    return {
        title: lambda variant, key=key: Estimate(**variant[part][key])  # type: ignore[misc]
        for key, title in keys.items()
    }


TEXT = estimates(
    "text",
    perplexity="perplexity",
    nll_above_original="loss above the original",
    kl="KL",
    agreement="same top token",
)
ANSWERS = estimates(
    "answers", nll_above_original="loss above the original", kl="KL", agreement="same top token"
)


def by_variant(summary: Summary, columns: Columns) -> str:
    """One row for each plan."""
    rows = [
        (
            name,
            ", ".join(map(str, variant["full_attention_layers"])) or "none",
            *(show(variant) for show in columns.values()),
        )
        for name, variant in summary["variants"].items()
    ]
    return table(("plan", "full layers", *columns), rows)


def heatmap(summary: Summary, name: str, task: str, baseline: str | None = None) -> str:
    """Accuracy by length and depth, or its difference to another plan's."""
    cells = summary["variants"][name]["heatmaps"][task]
    other = summary["variants"][baseline]["heatmaps"][task] if baseline else None
    depths = sorted({cell["depth"] for cell in cells})
    rows: dict[int, list[str]] = {}
    for i, cell in enumerate(cells):
        value = cell["accuracy"]
        text = f"{value:.2f}" if other is None else f"{value - other[i]['accuracy']:+.2f}"
        rows.setdefault(cell["length_tokens"], []).append(text)
    columns = ("tokens", *(f"{depth:.0%}" for depth in depths))
    return table(columns, [(length, *values) for length, values in rows.items()])


def versions() -> str:
    """What it ran on."""
    return (
        f"hybridize {version('hybridize')}, torch {version('torch')}, transformers "
        f"{version('transformers')}, Python {platform.python_version()}, {platform.machine()}"
    )
