"""`hybridize plan`: choose the layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from converter.cli.options import (
    CHOICE,
    MASK,
    PATH,
    Common,
    common_options,
    force_option,
    out_option,
    settings_options,
)
from converter.errors import UsageError


@click.command()
@click.argument("source")
@click.option("--scores", "scores_file", type=PATH, metavar="FILE", help="Scores to decide from.")
@click.option(
    "--context",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="Context for the KV cache's size. [default: the budget's, else the model's]",
)
@click.option("--every-offset", is_flag=True, help="Show the periodic plan at every offset.")
@settings_options("revision", *CHOICE, *MASK)
@out_option
@force_option
@common_options(recipe=True)
def plan(
    common: Common,
    source: str,
    scores_file: Path | None,
    context: int | None,
    every_offset: bool,
    out: Path | None,
    force: bool,
    **options: Any,
) -> None:
    """Choose which layers of SOURCE keep full attention, from scores or without."""
    from dataclasses import replace

    from converter.cli.show import show_plan, show_scores
    from converter.decide import check_method, check_plan_settings, chosen_budget, decide
    from converter.files import check_file_absent, write_json
    from converter.plan import kv_bytes
    from converter.scores import load_scores
    from converter.selectors import PERIODIC, periodic_offsets
    from converter.source import open_source

    settings = common.settings(options)
    if out is not None:
        check_file_absent(out, force)
    opened = open_source(source, revision=settings.revision, offline=common.offline)
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
    chosen = decide(opened, settings, scores)
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
