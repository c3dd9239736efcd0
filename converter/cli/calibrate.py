"""`hybridize calibrate`: score every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from converter.cli.options import (
    CHOOSING,
    DATA,
    MASK,
    PATH,
    PLACEMENT,
    SCORING,
    Common,
    common_options,
    force_option,
    settings_options,
    work_options,
)
from converter.common.errors import UsageError


@click.command()
@click.argument("source")
@click.option("--out", type=PATH, metavar="FILE", required=True, help="Where to write the scores.")
@click.option(
    "--controls", is_flag=True, help="Measure also what the scores should and should not show."
)
@settings_options("revision", *CHOOSING, "budget", "target", *MASK, *DATA, *SCORING, *PLACEMENT)
@work_options
@force_option
@common_options(recipe=True)
def calibrate(
    common: Common,
    source: str,
    out: Path,
    controls: bool,
    work: Path | None,
    fresh: bool,
    force: bool,
    **options: Any,
) -> int:
    """Measure what each layer's full attention is worth; resumable after every example.

    SOURCE is a model folder or a Hub id. Scoring stops where it is clear which layers the budget
    keeps; --exact scores every layer on every example. Several processes share the work when
    torchrun starts them: torchrun --nproc-per-node 4 -m converter calibrate ...
    """
    from dataclasses import replace

    from converter import pipeline
    from converter.calibration.agreement import agreement
    from converter.calibration.calibrate import calibrate as measure
    from converter.calibration.diagnostics import measure_controls
    from converter.calibration.distributed import joined_processes
    from converter.calibration.run import clear_work
    from converter.calibration.selectors import MEASURING, methods_of
    from converter.cli.tables import say_account, show_calibration
    from converter.common.files import check_file_absent, write_json
    from converter.decide import choose_mask
    from converter.engines.support import check_target
    from converter.model.source import open_source

    settings = common.settings(options)
    if not set(methods_of(settings.method)) & set(MEASURING):
        raise UsageError(
            "this method measures nothing",
            where="--method",
            expected=", ".join(MEASURING),
            got=settings.method,
        )
    check_file_absent(out, force)
    opened = open_source(source, revision=settings.revision, offline=common.offline)
    # Scores hold for one mask, so a mask that the target does not have is refused now.
    check_target(settings.target, opened, choose_mask(settings, opened.shape))
    task = pipeline.task_of(settings, opened)
    with joined_processes() as processes:
        console = common.console if processes.leads else replace(common.console, verbosity=-1)
        progress = pipeline.RunContext(
            folder=work or out.with_name(f"{out.name}.work"),
            fresh=fresh,
            progress=console.progress,
            announce=lambda examples: say_account(console, examples),
            say=console.say,
            processes=processes,
        )
        run = pipeline.calibration_run(
            opened,
            replace(settings, holdout=0),
            progress,
            comparing=pipeline.compares(opened, settings),
        )
        calibration = measure(run, task, console.progress)
        if controls:
            controlled = measure_controls(run, calibration.scores, console.progress)
            calibration = replace(
                calibration, scores=replace(calibration.scores, controls=controlled.to_json())
            )
        if not processes.leads:
            return 0
    scores = calibration.scores
    write_json(out, scores.to_json())
    if work is None:
        clear_work(progress.folder)
    value = {key: part for key, part in scores.to_json().items() if key != "per_example"}
    value["seconds"] = calibration.seconds
    several = len({example.kind for example in scores.examples}) > 1
    found = agreement(scores.examples, max(1, task.keep)) if several else None
    value["agreement"] = None if found is None else found.to_json()
    console.result(value, lambda: show_calibration(console, calibration, found))
    console.say(f"scores: {out}")
    return 1 if controls and not controlled.ok else 0
