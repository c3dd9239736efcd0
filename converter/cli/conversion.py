"""How a conversion looks on a terminal: what to know on one screen, all the tables when asked."""

from __future__ import annotations

from shlex import quote
from typing import TYPE_CHECKING

from converter.calibration.figures import CURVE_PICTURE
from converter.cli.console import Console
from converter.cli.score_tables import show_scores, show_uncompared, told_counts
from converter.cli.tables import show_plan, show_quality, show_report
from converter.engines.support import verdicts

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from converter.calibration.curve import Curve
    from converter.calibration.results import Quality
    from converter.model.source import Source
    from converter.pipeline import Converted
    from converter.plan.plan import Plan

# A curve of more layers shows those numbers of them that are likely to be wanted.
_ALL_ROWS = 7


def show_conversion(
    console: Console, converted: Converted, source: Source, named: str | None
) -> None:
    """The plan, what it and others lose, the verdict and what to do next.

    Args:
        named: what the user called the source; None where nothing was converted from it.
    """
    plan, curve = converted.plan, converted.curve
    if console.verbosity > 0 and converted.scores is not None:
        show_scores(console, converted.scores, plan)
    show_plan(console, plan, source.shape, source.shape.context_tokens)
    if console.verbosity > 0 and converted.quality is not None:
        show_quality(console, converted.quality)
    if converted.scores is not None and any(
        d.got < d.asked for d in converted.scores.drawn.values()
    ):
        console.print(f"Chosen on {told_counts(converted.scores.drawn)}.")
    if curve is not None:
        _show_choices(console, curve, plan)
    if converted.quality is not None and console.verbosity <= 0:
        for finding in converted.quality.findings() or _spaced_findings(converted.quality):
            console.print(finding)
    if curve is not None:
        console.print(curve.advice.reason)
    elif converted.scores is not None and console.verbosity <= 0:
        show_uncompared(console, converted.scores, plan)
    if converted.report is not None:
        show_report(console, converted.report)
    _show_verdict(console, converted)
    if converted.report is None or converted.report.ok:
        _show_next(console, converted, source, named)


def _show_choices(console: Console, curve: Curve, plan: Plan) -> None:
    """What numbers of full layers lose and save, the plan's and the recommended one marked."""
    units, mine = curve.units, len(plan.units_in_full(curve.units))
    advised = curve.advice.point
    step, layers = units.per_layer, units.layers
    counts: Iterable[int] = range(0, units.total + 1, step)
    if layers >= _ALL_ROWS:
        near = () if advised is None else (advised.count - step, advised.count)
        shares = (0, -(-layers // 8), -(-layers // 4), -(-layers // 2), layers)
        counts = (*(step * share for share in shares), mine, *near)
    rows = []
    for point in curve.points:
        if point.count in counts and not point.is_periodic:
            marks = ["chosen"] * (point.count == mine) + ["advised"] * (point == advised)
            share, loss = f"{point.kv_share:.0%}", "" if point is curve.original else point.loss
            rows.append((point.count, share, loss, point.right, ", ".join(marks)))
    console.print(
        f"{curve.examples} held-out examples; nats per answer token ± standard error; 95% intervals"
    )
    console.table((f"full {units}", "KV cache", "above the original", "answers right", ""), rows)


def _spaced_findings(quality: Quality) -> list[str]:
    """What as many evenly spaced layers lose, at the best and the worst offset."""
    spaced = [outcome for outcome in quality.others if outcome.offset is not None]
    if not spaced:
        return []
    spaced.sort(key=lambda one: one.loss.mean)
    best_plan = spaced[0]
    best, worst = (one.loss_above(quality.original) for one in (spaced[0], spaced[-1]))
    count = len(best_plan.full) // best_plan.kv_heads
    return [
        f"Evenly spaced, {count} layers lose {best} at the best of {len(spaced)} offsets, "
        f"{worst} at the worst."
    ]


def _show_verdict(console: Console, converted: Converted) -> None:
    """Where the checkpoint is, and whether it computes its plan."""
    report, folder = converted.report, converted.folder
    if report is not None and not report.ok:
        console.print(
            f"FAILED: the checkpoint does not compute its plan; left at {folder} to look at"
        )
        return
    how = ", ".join(sorted(set(converted.links.values())))
    proof = (
        "not proved yet"
        if report is None
        else f"it computes its plan ({len(report.checks)} checks)"
    )
    console.print(f"checkpoint: {folder} (weights: {how}); {proof}")
    if converted.curve is not None:
        console.print(f"picture: {folder / CURVE_PICTURE}")


def _show_next(console: Console, converted: Converted, source: Source, named: str | None) -> None:
    """The commands that are likely to follow."""
    folder = converted.folder
    against = f" --against {quote(named)}" if named is not None else ""
    commands = [("run", ""), ("evaluate", against)]
    engines = verdicts(source, converted.plan.mask, by_heads=converted.plan.is_mixed)
    if any(one.target == "llama.cpp" and one.word == "honoured" for one in engines):
        commands.append(("export", f" {_gguf(folder)} --type q8_0"))
    if converted.report is None:
        commands.insert(0, ("verify", against))
    advised = None if converted.curve is None else converted.curve.advice.point
    if converted.curve is not None and advised is not None:
        kept = len(converted.plan.units_in_full(converted.curve.units))
    if advised is not None and advised.count != kept:
        commands.insert(0, ("retarget", f" --budget {advised.count}"))
    console.say("next:")
    for name, options in commands:
        console.say(f"  hybridize {name} {quote(str(folder))}{options}")


def _gguf(folder: Path) -> str:
    return quote(f"{folder}.gguf")
