"""`hybridize plan`: choose the layers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from converter.cli.grouping import Section, command, option
from converter.cli.options import (
    MEASURING,
    MODEL,
    PATH,
    Common,
    common_options,
    force_option,
    given_scores,
    out_option,
    scores_option,
    settings_options,
    work_options,
)
from converter.common.errors import UsageError

if TYPE_CHECKING:
    from converter.calibration.curve import Curve
    from converter.calibration.scores import Scores
    from converter.model.source import Source
    from converter.plan.plan import Plan
    from converter.settings import Settings


@command()
@click.argument("source", type=MODEL)
@scores_option
@settings_options(*MEASURING, "layers", "offset", "holdout")
@option(
    Section.KEEP,
    "--context context_tokens TOKENS",
    "Context for the KV cache's size. [default: the budget's, else the model's]",
    type=click.IntRange(min=1),
)
@option(
    Section.CHOOSING, "--pareto", "Measure every number of full layers: quality against budget."
)
@option(
    Section.CHOOSING,
    "--curve curve_file FILE",
    "Show a curve that was saved, instead of measuring one.",
    type=PATH,
)
@option(Section.OUTPUT, "--picture FILE.png", "Draw the curve.", type=PATH)
@out_option
@work_options
@force_option
@common_options(recipe=True)
def plan(
    common: Common,
    source: str,
    scores_file: Path | None,
    context_tokens: int | None,
    pareto: bool,
    curve_file: Path | None,
    picture: Path | None,
    out: Path | None,
    work: Path | None,
    fresh: bool,
    force: bool,
    **options: Any,
) -> None:
    """Choose which layers of SOURCE keep full attention.

    From scores or without. The model is run only for a loss bound (--budget nll:0.05) and for
    --pareto, whose result is the curve instead of a plan; --curve shows that again.
    """
    from converter import pipeline
    from converter.calibration.distributed import refuse_several_processes
    from converter.calibration.run import clear_work
    from converter.common.files import check_file_absent
    from converter.model.source import open_source

    settings = common.settings(options)
    refuse_several_processes("plan")
    wants_curve = pareto or curve_file is not None
    _check_picture(picture, wants_curve)
    for file in (out, picture):
        if file is not None:
            check_file_absent(file, force)
    context = common.run_context(out or Path("plan"), work, fresh)
    opened = open_source(source, revision=settings.revision, offline=common.offline)
    scores = given_scores(scores_file, settings, None if wants_curve else options["method"])
    if wants_curve:
        _check_curve(settings, options["budget"])
        tokens = context_tokens or opened.shape.context_tokens
        if curve_file is None:
            curve = pipeline.curve(opened, settings, context, tokens, scores)
        else:
            also = {"--pareto": pareto, "--scores": scores, "--context": context_tokens}
            curve = _saved_curve(curve_file, opened, [name for name in also if also[name]])
        _give_curve(common, curve, out, picture)
    else:
        chosen = pipeline.plan(opened, settings, context, scores)
        tokens = context_tokens or settings.parsed_budget().tokens(opened.shape)
        _give_plan(common, opened, chosen, scores, tokens, settings.target, out)
    if work is None:
        clear_work(context.folder)


def _saved_curve(file: Path, source: Source, also: list[str]) -> Curve:
    """A curve from a file, which must be of a model as deep; nothing is left to measure."""
    from converter.calibration.curve import load_curve

    if also:
        raise UsageError("--curve is measured already", got=f"also {', '.join(also)}")
    curve = load_curve(file)
    if curve.units.layers != len(source.shape.full_layers):
        raise UsageError(
            "the curve is of a model of another depth",
            where=file,
            expected=f"{len(source.shape.full_layers)} layers",
            got=curve.units.layers,
        )
    return curve


def _check_picture(picture: Path | None, wants_curve: bool) -> None:
    if picture is not None and not wants_curve:
        raise UsageError(
            "only the curve has a picture", where="--picture", expected="--pareto or --curve"
        )
    if picture is not None and picture.suffix != ".png":
        raise UsageError(
            "the picture is a PNG",
            where="--picture",
            expected="a name that ends in .png",
            got=picture,
        )


def _check_curve(settings: Settings, budget: str | None) -> None:
    asked = {"--layers": settings.layers, "--budget": budget}
    given = [name for name, value in asked.items() if value is not None]
    if given:
        raise UsageError(
            "the curve is over every number of layers",
            where="--pareto",
            got=f"also {', '.join(given)}",
        )


def _give_plan(
    common: Common,
    source: Source,
    chosen: Plan,
    scores: Scores | None,
    context_tokens: int,
    target: str,
    out: Path | None,
) -> None:
    """Print the plan, and write it where that is wanted."""
    from converter.cli.score_tables import show_scores
    from converter.cli.tables import show_plan
    from converter.common.files import write_json
    from converter.engines.vllm import vllm_cache
    from converter.plan.plan import kv_bytes

    console, vllm = common.console, None
    if target == "vllm":
        kept = len(chosen.full_attention_layers)
        vllm = vllm_cache(kept, chosen.mask, source.shape, context_tokens)
    value = chosen.to_json() | {"kv_bytes": kv_bytes(chosen, source.shape, context_tokens)}
    if vllm is not None:
        value["vllm"] = asdict(vllm)
    if out is not None:
        write_json(out, value)

    def show() -> None:
        if scores is not None:
            show_scores(console, scores, chosen)
        show_plan(console, chosen, source.shape, context_tokens, vllm)

    console.result(value, show)
    if out is not None:
        console.say(f"plan: {out}")


def _give_curve(common: Common, curve: Curve, out: Path | None, picture: Path | None) -> None:
    """Print the curve, and write and draw it where that is wanted."""
    from converter.calibration.figures import pareto_figure
    from converter.cli.tables import show_curve
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
