"""`hybridize plan`: choose the layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from converter.cli.options import (
    CHOICE,
    CHOOSING,
    DATA,
    MASK,
    PATH,
    PLACEMENT,
    Common,
    common_options,
    force_option,
    out_option,
    settings_options,
    work_options,
)
from converter.common.errors import UsageError

if TYPE_CHECKING:
    from converter.calibration.curve import Curve


@click.command()
@click.argument("source")
@click.option("--scores", "scores_file", type=PATH, metavar="FILE", help="Scores to decide from.")
@click.option(
    "--context",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="Context for the KV cache's size. [default: the budget's, else the model's]",
)
@click.option(
    "--pareto", is_flag=True, help="Measure every number of full layers: quality against budget."
)
@click.option("--picture", type=PATH, metavar="FILE.png", help="Draw what --pareto measures.")
@click.option("--every-offset", is_flag=True, help="Show the periodic plan at every offset.")
@settings_options("revision", *CHOICE, *CHOOSING[1:], *MASK, *DATA, "holdout", "memory", *PLACEMENT)
@out_option
@work_options
@force_option
@common_options(recipe=True)
def plan(
    common: Common,
    source: str,
    scores_file: Path | None,
    context: int | None,
    pareto: bool,
    picture: Path | None,
    every_offset: bool,
    out: Path | None,
    work: Path | None,
    fresh: bool,
    force: bool,
    **options: Any,
) -> None:
    """Choose which layers of SOURCE keep full attention, from scores or without.

    The model is run only for a loss bound (--budget nll:0.05) and for --pareto, whose result is the
    curve instead of a plan.
    """
    from dataclasses import replace

    from converter import pipeline
    from converter.calibration.distributed import refuse_several_processes
    from converter.calibration.run import clear_work
    from converter.calibration.scores import load_scores
    from converter.calibration.selectors import PERIODIC, periodic_offsets
    from converter.cli.tables import say_account, show_plan, show_scores
    from converter.common.files import check_file_absent, write_json
    from converter.decide import check_method, check_plan_settings, chosen_budget, decide
    from converter.model.source import open_source
    from converter.plan.plan import kv_bytes

    settings = common.settings(options)
    refuse_several_processes("plan")
    if picture is not None and not pareto:
        raise UsageError("only the curve has a picture", where="--picture", expected="--pareto")
    if picture is not None and picture.suffix != ".png":
        raise UsageError(
            "the picture is a PNG",
            where="--picture",
            expected="a name that ends in .png",
            got=picture,
        )
    for file in (out, picture):
        if file is not None:
            check_file_absent(file, force)
    progress = pipeline.RunContext(
        folder=work or (out or Path("plan")).with_name(f"{out.name if out else 'plan'}.work"),
        fresh=fresh,
        progress=common.console.progress,
        announce=lambda examples: say_account(common.console, examples),
        say=common.console.say,
    )
    opened = open_source(source, revision=settings.revision, offline=common.offline)
    if pareto:
        clashing = [
            flag
            for flag, given in (
                ("--every-offset", every_offset),
                ("--layers", settings.layers is not None),
                ("--budget", options["budget"] is not None),
            )
            if given
        ]
        if clashing:
            raise UsageError(
                "the curve is over every number of layers",
                where="--pareto",
                got=f"also {', '.join(clashing)}",
            )
        scores = load_scores(scores_file) if scores_file else None
        tokens = context or opened.shape.context_tokens
        curve = pipeline.quality_curve(opened, settings, scores, progress, tokens)
        _give_curve(common, curve, out, picture)
        if work is None:
            clear_work(progress.folder)
        return
    if every_offset:
        if settings.layers is not None:
            raise UsageError(
                "named layers have no offset", where="--every-offset", got="also --layers"
            )
        settings = replace(settings, method=PERIODIC.name)
    scores = load_scores(scores_file) if scores_file else None
    if scores is not None:
        check_method(scores, options["method"])
    else:
        check_plan_settings(opened, settings)
    count = pipeline.bound_count(opened, settings, scores, progress)
    chosen = decide(opened, settings, scores, count)
    if work is None:
        clear_work(progress.folder)
    tokens = context or chosen_budget(settings).tokens(opened.shape)
    value = chosen.to_json() | {"kv_bytes": kv_bytes(chosen, opened.shape, tokens)}
    if every_offset:
        count = len(chosen.full_attention_layers)
        plans = [
            decide(opened, replace(settings, offset=offset), scores)
            for offset in range(periodic_offsets(opened.shape.layers, count))
        ]
        value["every_offset"] = [list(other.full_attention_layers) for other in plans]
    if out is not None:
        write_json(out, value)

    def show() -> None:
        if scores is not None:
            show_scores(common.console, scores, chosen)
        show_plan(common.console, chosen, opened.shape, tokens)
        if every_offset:
            common.console.print("every offset")
            for offset, other in enumerate(plans):
                common.console.print(f"  {offset}  {other.strip}")

    common.console.result(value, show)
    if out is not None:
        common.console.say(f"plan: {out}")


def _give_curve(common: Common, curve: Curve, out: Path | None, picture: Path | None) -> None:
    """Print the curve, and write and draw it where that is wanted."""
    from converter.calibration.figures import pareto_figure
    from converter.cli.curve_tables import show_curve
    from converter.common.drawing import LIGHT, drawing, to_png
    from converter.common.files import write_bytes, write_json

    if out is not None:
        write_json(out, curve.to_json())
    if picture is not None:
        with drawing():
            write_bytes(picture, to_png(pareto_figure(curve, LIGHT), LIGHT))
    common.console.result(curve.to_json(), lambda: show_curve(common.console, curve))
    for file in (out, picture):
        if file is not None:
            common.console.say(f"curve: {file}")
