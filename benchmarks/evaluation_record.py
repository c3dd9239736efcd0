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

Summary = Mapping[str, Any]


def hybridize(*arguments: object) -> str:
    """Run the command line in a process of its own; what it prints on stdout."""
    command = [sys.executable, "-m", "converter", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def evaluate(model: Path, out: Path, *options: object) -> tuple[str, Summary, float]:
    """Evaluate a model.

    Returns:
        The command as a reader would type it, its JSON, and the seconds it took.
    """
    arguments = ["evaluate", model, *options, "--out", out, "--force"]
    started = time.perf_counter()
    summary = json.loads(hybridize(*arguments, "--json", "-q"))
    names = [a.name if isinstance(a, Path) else str(a) for a in arguments[:-3]]
    return f"hybridize {shlex.join(names)}", summary, time.perf_counter() - started


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def share(value: Mapping[str, Any]) -> str:
    """An accuracy with its interval."""
    return f"{value['accuracy']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def change(value: Mapping[str, Any] | None) -> str:
    """A paired difference with its interval."""
    if value is None:
        return ""
    return f"{value['mean']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"


def estimate(value: Mapping[str, Any]) -> str:
    """A mean with its standard error."""
    error = "?" if value["stderr"] is None else f"{value['stderr']:.3f}"
    return f"{value['mean']:.3f} ± {error}"


def by_variant(
    summary: Summary, columns: Mapping[str, Callable[[Mapping[str, Any]], object]]
) -> str:
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
