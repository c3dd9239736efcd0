"""How results look on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from converter.cli.console import Console
from converter.common.units import human_bytes

if TYPE_CHECKING:
    from converter.calibration.curve import Curve, Point
    from converter.calibration.data.examples import Examples
    from converter.calibration.results import Quality
    from converter.checkpoint.verify.report import Report
    from converter.engines.vllm import VllmCache
    from converter.model.dimensions import ModelDimensions
    from converter.plan.plan import Plan

_ON_FRONT = "●"
# Rows of many shapes are dropped for many reasons; the most frequent are told.
_REASONS = 5


def say_counts(console: Console, examples: Examples) -> None:
    """How many examples there are, set by set, and why rows were dropped."""
    _say_rows(console, "examples", examples, reasons=not examples.sets)
    for name, part in examples.sets.items():
        _say_rows(console, f"  {name}", part, reasons=True)


def _say_rows(console: Console, name: str, examples: Examples, *, reasons: bool) -> None:
    kept = len(examples.all)
    told = (
        f"{name}: {kept} of {examples.looked_at} rows kept "
        f"({len(examples.scored)} to score layers on, "
        + f"{len(examples.validation)} to compare choices on, " * bool(examples.validation)
        + f"{len(examples.held_out)} held out)"
    )
    if kept < sum(examples.asked):
        asked = " + ".join(map(str, filter(None, examples.asked)))
        console.warn(f"{told}, where {asked} were asked for: {examples.remedy}")
    else:
        console.say(told)
    margin = " " * (len(name) - len(name.lstrip()) + 2)
    for reason, count in list(examples.dropped.items())[:_REASONS] if reasons else ():
        console.say(f"{margin}dropped: {reason}: {count}")
    if reasons and len(examples.dropped) > _REASONS:
        console.say(f"{margin}and for {len(examples.dropped) - _REASONS} more reasons")


def show_plan(
    console: Console,
    plan: Plan,
    shape: ModelDimensions,
    context_tokens: int,
    vllm: VllmCache | None = None,
) -> None:
    """The strip, what was chosen, and what it costs, in vLLM too where that is given."""
    from converter.plan.plan import kv_bytes
    from converter.plan.units import Units

    cost = kv_bytes(plan, shape, context_tokens)
    units = Units(len(shape.full_layers), shape.kv_heads if plan.is_mixed else 1)
    kept = plan.units_in_full(units)
    mixed = "  ▒ by KV heads" if plan.is_mixed else ""
    others = "" if len(kept) == len(plan.layer_types) or not shape.kinds else "  - as it is"
    console.print(f"{plan.strip}   █ full attention  · sliding{mixed}{others}")
    if plan.is_mixed:
        for head, strip in enumerate(plan.head_strips(shape.kv_heads)):
            console.print(f"{strip}   KV head {head}")

    def share(size: int) -> str:
        full = cost["full"]
        return f"{human_bytes(size)} instead of {human_bytes(full)} ({size / full:.0%})"

    rows = [
        (
            f"full {units}",
            f"{'' if plan.is_mixed else f'{units.told(kept)} ('}{len(kept)} of {units.total}"
            f"{'' if plan.is_mixed else ')'}",
        ),
        ("sliding layers see", str(plan.mask)),
        ("chosen by", plan.method + (f", budget {plan.budget}" if plan.budget else "")),
        (f"KV cache at {context_tokens:,} tokens", share(cost["hybrid"])),
    ]
    if vllm is not None:
        rows.append(("in vLLM", f"{share(vllm.bytes)}: {vllm.layers_held}"))
        if vllm.better:
            rows.append(("better there", f"{' or '.join(map(str, vllm.better))} full layers"))
    console.pairs(rows)


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
    """The checks of a verification that failed; all of them where more talk is wanted."""
    checks = [check for check in report.checks if not check.ok or console.verbosity > 0]
    if not checks:
        return

    def text(value: object) -> str:
        return f"{value:.2e}" if isinstance(value, float) else str(value)

    console.table(
        ("", "check", "found", "held against"),
        [
            ("ok" if check.ok else "FAILED", check.name, text(check.value), text(check.limit))
            for check in checks
        ],
    )


def show_curve(console: Console, curve: Curve) -> None:
    """Every chosen plan by number of full layers, beside the evenly spaced ones of that number."""
    periodic = curve.periodic()
    chosen = [point for point in curve.points if not point.is_periodic]
    # A number that only evenly spaced plans were measured for still has its row.
    counts = {point.count for point in chosen}
    chosen += [group[0] for count, group in periodic.items() if count not in counts]
    console.print(
        f"measured on {curve.examples} examples (NLL in nats per answer token, ± standard error; "
        f"95% intervals), KV cache at {curve.context_tokens:,} tokens"
    )
    console.table(
        (
            *(
                f"full {curve.units}",
                "chosen by",
                "KV cache",
                "of the original",
                "above the original",
            ),
            *("answers right", "front", "evenly spaced, best", "evenly spaced, worst"),
        ),
        [
            (
                point.count,
                point.name,
                human_bytes(point.kv_bytes),
                f"{point.kv_share:.0%}",
                "" if point is curve.original else point.loss,
                point.right,
                _ON_FRONT if point.on_front else "",
                *_beside(periodic.get(point.count, ())),
            )
            for point in sorted(chosen, key=lambda point: point.count)
        ],
    )
    console.print(
        f"{_ON_FRONT} on the front: any other plan with as few full {curve.units} loses more, by "
        "its mean"
    )
    console.print(curve.advice.reason)


def _beside(group: tuple[Point, ...]) -> tuple[str, str]:
    """The losses of the best and the worst offset; no texts where there are none."""
    if not group:
        return "", ""
    best, worst = group[0], group[-1]
    return f"{best.loss}{' ' + _ON_FRONT if best.on_front else ''}", str(worst.loss)
