"""`hybridize calibrate`: score every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from converter.cli.grouping import Section, command, option
from converter.cli.options import (
    MEASURING,
    MODEL,
    PATH,
    Common,
    common_options,
    force_option,
    settings_options,
    work_options,
)


@command()
@click.argument("source", type=MODEL)
@option(Section.OUTPUT, "--out FILE", "Where to write the scores.", type=PATH, required=True)
@option(Section.CHOOSING, "--controls", "Measure also what the scores should and should not show.")
@settings_options(*MEASURING, "exact")
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
    """Measure what the full attention of each layer is worth.

    Resumable after every example. SOURCE is a model folder or a Hub id. Scoring stops where it is
    clear which layers the budget keeps; --exact scores every layer on every example. Several
    processes share the work when torchrun starts them: torchrun --nproc-per-node 4 -m converter
    calibrate ...
    """
    from converter import pipeline
    from converter.calibration.diagnostics import agreement
    from converter.calibration.distributed import joined_processes
    from converter.calibration.run import clear_work
    from converter.cli.score_tables import show_calibration
    from converter.common.files import check_file_absent, write_json
    from converter.model.source import open_source

    settings = common.settings(options)
    check_file_absent(out, force)
    opened = open_source(source, revision=settings.revision, offline=common.offline)
    with joined_processes() as processes:
        context = common.run_context(out, work, fresh, processes)
        calibration = pipeline.calibrate(opened, settings, context, controls=controls)
    if not processes.leads:
        return 0
    scores = calibration.scores
    write_json(out, scores.to_json())
    if work is None:
        clear_work(context.folder)
    several = len({example.kind for example in scores.examples}) > 1
    found = agreement(scores.examples) if several else None
    value = {key: part for key, part in scores.to_json().items() if key != "per_example"}
    value["seconds"] = calibration.seconds
    value["agreement"] = None if found is None else found.to_json()
    common.console.result(value, lambda: show_calibration(common.console, calibration, found))
    common.console.say(f"scores: {out}")
    return 0 if (scores.controls or {}).get("null_largest") in (None, 0.0) else 1
