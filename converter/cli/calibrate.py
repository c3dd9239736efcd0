"""`hybridize calibrate`: score every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from converter.cli.options import (
    DATA,
    MASK,
    PATH,
    PLACEMENT,
    Common,
    common_options,
    force_option,
    settings_options,
    work_options,
)
from converter.errors import UsageError


@click.command()
@click.argument("source")
@click.option("--out", type=PATH, metavar="FILE", required=True, help="Where to write the scores.")
@settings_options("revision", "method", *MASK, *DATA, *PLACEMENT)
@work_options
@force_option
@common_options(recipe=True)
def calibrate(
    common: Common,
    source: str,
    out: Path,
    work: Path | None,
    fresh: bool,
    force: bool,
    **options: Any,
) -> None:
    """Measure what each layer's full attention is worth; resumable after every example.

    SOURCE is a model folder or a Hub id.
    """
    from dataclasses import replace

    from converter import pipeline
    from converter.cli.show import say_account, show_scores
    from converter.files import check_file_absent, write_json
    from converter.measure import calibrate as measure
    from converter.measure import clear_work
    from converter.selectors import MEASURED
    from converter.source import open_source

    settings = common.settings(options)
    if settings.method not in MEASURED:
        raise UsageError(
            "this method measures nothing",
            where="--method",
            expected=", ".join(MEASURED),
            got=settings.method,
        )
    check_file_absent(out, force)
    opened = open_source(source, revision=settings.revision, offline=common.offline)
    progress = pipeline.Work(
        folder=work or out.with_name(f"{out.name}.work"),
        fresh=fresh,
        progress=common.console.progress,
        announce=lambda examples: say_account(common.console, examples),
    )
    measurement = pipeline.measurement_of(opened, replace(settings, holdout=0), progress)
    scores = measure(measurement, settings.method, progress.progress)
    write_json(out, scores.to_json())
    if work is None:
        clear_work(progress.folder)
    value = {key: part for key, part in scores.to_json().items() if key != "per_example"}
    common.console.result(value, lambda: show_scores(common.console, scores))
    common.console.say(f"scores: {out}")
