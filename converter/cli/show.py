"""How results look on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from converter.console import Console, human_bytes
from converter.mask import FULL

if TYPE_CHECKING:
    from converter.data import Examples
    from converter.plan import Plan
    from converter.quality import Quality
    from converter.scores import Scores
    from converter.shape import ModelShape
    from converter.verification.report import Report


def say_account(console: Console, examples: Examples) -> None:
    """How many calibration rows were kept, and why the others were not."""
    account = dict(examples.account)
    kept, seen = account.pop("kept"), account.pop("looked at")
    console.say(
        f"examples: {kept} of {seen} rows kept ({len(examples.scored)} to score layers on, "
        f"{len(examples.held_out)} held out)"
    )
    for reason, count in account.items():
        console.say(f"  {reason}: {count}")


def show_plan(console: Console, plan: Plan, shape: ModelShape, context_tokens: int) -> None:
    """The strip, what was chosen, and what it costs."""
    from converter.plan import kv_bytes

    cost = kv_bytes(plan, shape, context_tokens)
    kept = plan.full_attention_layers
    console.print(f"{plan.strip}   █ full attention  · sliding")
    console.pairs(
        [
            (
                "full layers",
                f"{', '.join(map(str, kept)) or 'none'} ({len(kept)} of {shape.layers})",
            ),
            ("sliding layers see", str(plan.mask)),
            ("chosen by", plan.method + (f", budget {plan.budget}" if plan.budget else "")),
            (
                f"KV cache at {context_tokens:,} tokens",
                f"{human_bytes(cost['hybrid'])} instead of {human_bytes(cost['full'])} "
                f"({cost['hybrid'] / cost['full']:.0%})",
            ),
        ],
    )


def show_scores(console: Console, scores: Scores, plan: Plan | None = None) -> None:
    """Each layer's score; with a plan, which layers it keeps."""
    places = {layer: place for place, layer in enumerate(scores.ranking, start=1)}
    rows = []
    for index, score in enumerate(scores.layers):
        row: list[object] = [index, score, places[index]]
        if plan is not None:
            row.append("█ full" if plan.layer_types[index] == FULL else "· sliding")
        rows.append(row)
    columns = ["layer", f"{scores.method} (nats per answer token)", "rank"]
    console.table(columns + (["plan"] if plan is not None else []), rows)


def show_quality(console: Console, quality: Quality) -> None:
    """The hybrid beside the original and what it must beat."""
    console.print(
        f"on {len(quality.original.nll)} held-out examples (NLL in nats per answer token, "
        "± standard error; 95% intervals)"
    )
    console.table(
        ("", "answer NLL", "above the original", "answers right"),
        [
            (
                outcome.name,
                outcome.loss,
                "" if outcome is quality.original else outcome.loss_above(quality.original),
                outcome.accuracy,
            )
            for outcome in quality.outcomes
        ],
    )
    for finding in quality.findings():
        console.print(finding)


def show_report(console: Console, report: Report) -> None:
    """Every check of a verification."""

    def text(value: object) -> str:
        return f"{value:.2e}" if isinstance(value, float) else str(value)

    console.table(
        ("", "check", "found", "held against"),
        [
            ("ok" if check.ok else "FAILED", check.name, text(check.value), text(check.limit))
            for check in report.checks
        ],
    )
