"""`hybridize convert` and `hybridize retarget`: write a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from converter.cli.grouping import Section, command, option
from converter.cli.options import (
    CHOICE,
    MASK,
    MEASURING,
    MODEL,
    PATH,
    Common,
    common_options,
    force_option,
    given_scores,
    scores_option,
    settings_options,
    work_options,
)
from converter.common.errors import UsageError
from converter.settings import SETTINGS

if TYPE_CHECKING:
    from converter.model.source import Source
    from converter.pipeline import Converted


@command()
@click.argument("source", type=MODEL, required=False)
@click.argument("out", type=PATH, required=False)
@option(Section.SOURCE, "--plan plan_file FILE", "Convert by this plan.", type=PATH)
@scores_option
@settings_options(*MEASURING, "layers", "offset", "exact", "holdout", "copy")
@option(
    Section.KEEP,
    "--profile profile_files NAME=FILE",
    "Offer a further plan by name; the model switches between requests.",
    multiple=True,
)
@option(
    Section.OUTPUT,
    "--verify/--no-verify prove",
    "Prove the checkpoint before it gets its name. [default: when the model was measured; a "
    "conversion by a given plan, scores or layers only writes, in seconds]",
    default=None,
)
@work_options
@force_option
@common_options(recipe=True)
def convert(
    common: Common,
    source: str | None,
    out: Path | None,
    plan_file: Path | None,
    scores_file: Path | None,
    profile_files: tuple[str, ...],
    prove: bool | None,
    work: Path | None,
    fresh: bool,
    force: bool,
    **options: Any,
) -> int:
    """Make a hybrid checkpoint of SOURCE in the folder OUT.

    Layers are measured and chosen, the checkpoint is written and proved. SOURCE is a model folder
    or a Hub id; with a recipe that names it, OUT stands alone. With --plan, --scores or --layers,
    only what is left is done.
    """
    from converter import pipeline
    from converter.calibration.distributed import refuse_several_processes
    from converter.calibration.run import clear_work
    from converter.model.source import open_source
    from converter.plan.plan import load_plan

    settings = common.settings(options)
    refuse_several_processes("convert")
    if out is None:
        source, out = settings.source, None if source is None else Path(source)
    if source is None or out is None:
        raise UsageError("say what to convert and where to", expected="SOURCE OUT")
    if plan_file is not None:
        _check_plan_decides(common, options, scores_file)
    earlier = pipeline.EarlierResults(
        plan=load_plan(plan_file) if plan_file else None,
        scores=given_scores(scores_file, settings, options["method"]),
        profiles={name: load_plan(Path(file)) for name, file in _pairs(profile_files)},
    )
    opened = open_source(source, revision=settings.revision, offline=common.offline)
    context = common.run_context(out, work, fresh)
    converted = pipeline.convert(opened, out, settings, earlier, context, force=force, prove=prove)
    if work is None and converted.folder == out:
        clear_work(context.folder)
    return _show(common, opened, converted, source)


def _check_plan_decides(common: Common, options: dict[str, Any], scores: Path | None) -> None:
    """Refuse settings beside a plan that would have to decide it."""
    names = [name for name in (*CHOICE, *MASK) if name != "target"]
    changed = {text.partition("=")[0].strip().replace("-", "_") for text in common.overrides}
    also = [SETTINGS[n].flag for n in names if options[n] is not None or n in changed]
    also += ["--scores"] if scores is not None else []
    if also:
        raise UsageError("--plan has decided already", got=f"also {', '.join(also)}")


@command()
@click.argument("checkpoint", type=PATH)
@settings_options("budget", "granularity", "layers", "target", "copy")
@common_options(recipe=False)
def retarget(common: Common, checkpoint: Path, **options: Any) -> int:
    """Rewrite the plan of CHECKPOINT from the scores it carries.

    The weights are not touched.
    """
    from converter import pipeline
    from converter.checkpoint.reader import source_inside

    settings = common.settings(options)
    if settings.budget is None and settings.layers is None:
        raise UsageError("say what the new plan is", expected="--budget 1/2 or --layers 3,7,11")
    converted = pipeline.retarget(checkpoint, settings)
    return _show(common, source_inside(checkpoint), converted, None)


def _pairs(texts: tuple[str, ...]) -> list[tuple[str, str]]:
    """The names and files of `--profile` options."""
    pairs = [text.partition("=") for text in texts]
    for name, equals, file in pairs:
        if not (name and equals and file):
            raise UsageError(
                "a profile needs a name and a plan",
                where="--profile",
                expected="NAME=FILE",
                got=f"{name}{equals}{file}",
            )
    return [(name, file) for name, _, file in pairs]


def _show(common: Common, source: Source, converted: Converted, named: str | None) -> int:
    """Print what a conversion did; its exit status."""
    from converter.checkpoint.writer import plan_json
    from converter.cli.conversion import show_conversion

    curve, report = converted.curve, converted.report
    value = {
        "checkpoint": str(converted.folder),
        "plan": plan_json(converted.plan, source),
        "quality": None if converted.quality is None else converted.quality.to_json(),
        "curve": None if curve is None else curve.to_json(),
        "verification": None if report is None else report.to_json(),
        "weights": dict(converted.links),
    }
    common.console.result(value, lambda: show_conversion(common.console, converted, source, named))
    return 0 if report is None or report.ok else 1
