"""`hybridize evaluate`: what a hybrid lost and what it saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from converter.cli.grouping import Section, command, option
from converter.cli.options import (
    MODEL,
    PATH,
    PLACEMENT,
    Command,
    Common,
    common_options,
    force_option,
    settings_options,
    trust_option,
    work_options,
)
from converter.common.errors import UsageError


def _count(
    section: Section, spelled: str, text: str, default: int | None = None, least: int = 1
) -> Callable[[Command], Command]:
    kind = click.IntRange(min=least)
    return option(section, f"{spelled} N", text, type=kind, default=default, show_default=True)


@command()
@click.argument("model", type=MODEL)
@option(Section.SOURCE, "--against SOURCE", "Run the original apart, from its own folder.")
@option(
    Section.ASKED,
    "--tasks NAME,...",
    "What to ask: recall, kv, copy, RULER's tasks (niah_single_1, ..., vt, cwe, fwe), "
    "`ruler`, `all` or `none`.",
    default="recall",
    show_default=True,
)
@option(
    Section.ASKED,
    "--rows FILE",
    "Also ask rows of this JSON Lines file: prompt and answer, or question and choices.",
    type=PATH,
    multiple=True,
)
@option(
    Section.ASKED,
    "--lengths N,...",
    "Tokens of prompt and answer together. [default: 1/2, 3/4 and all of the context, which "
    "counts up to 16384]",
)
@_count(Section.ASKED, "--depths", "Depths that evidence lies at, evenly spread.", default=5)
@_count(
    Section.ASKED, "--samples", "Items of each task and length, and rows of each file.", default=40
)
@option(Section.ASKED, "--haystack FILE", "Hide things in this text.", type=PATH)
@_count(Section.ASKED, "--seed", "Of items.", default=0, least=0)
@option(Section.ASKED, "--text FILE", "Measure perplexity and KL on this text.", type=PATH)
@_count(
    Section.ASKED,
    "--text-tokens",
    "Tokens of a chunk of it. [default: the longest length]",
    least=2,
)
@_count(Section.ASKED, "--text-chunks", "Chunks at most, evenly spread over the text.", default=32)
@option(Section.KEEP, "--budgets B,...", "Also these budgets, such as 1/8,1/4,1/2.")
@option(Section.KEEP, "--periodic", "Also evenly spaced layers, as many, at every offset.")
@option(Section.KEEP, "--plan plans FILE", "Also this plan file.", type=PATH, multiple=True)
@option(Section.ASKED, "--harness TASK,...", "Also run these tasks of lm-eval.")
@option(Section.ASKED, "--harness-tasks DIR", "Further task files of lm-eval.", type=PATH)
@_count(Section.ASKED, "--harness-limit", "Examples of each of them.")
@_count(
    Section.MACHINE,
    "--speed-runs",
    "Runs of each plan to time, in turns; 0 for none.",
    default=3,
    least=0,
)
@_count(Section.MACHINE, "--batch-size --batch", "Items generated at once.", default=8)
@option(
    Section.OUTPUT,
    "--out DIR",
    "Write the report here. [default: MODEL's name with -evaluation]",
    type=PATH,
)
@trust_option
@settings_options("revision", *PLACEMENT)
@work_options
@force_option
@common_options(recipe=False)
def evaluate(
    common: Common,
    model: str,
    against: str | None,
    revision: str | None,
    tasks: str,
    rows: tuple[Path, ...],
    lengths: str | None,
    depths: int,
    samples: int,
    haystack: Path | None,
    seed: int,
    text: Path | None,
    text_tokens: int | None,
    text_chunks: int,
    budgets: str | None,
    periodic: bool,
    plans: tuple[Path, ...],
    harness: str | None,
    harness_tasks: Path | None,
    harness_limit: int | None,
    speed_runs: int,
    batch_size: int,
    out: Path | None,
    trust_remote_code: bool,
    work: Path | None,
    fresh: bool,
    force: bool,
    **options: Any,
) -> int:
    """Measure what MODEL lost and saved by its plan.

    Writes a report; resumable. MODEL is a checkpoint of ours, or a model that was not converted.
    Exit 1 when a plan differs from the original within the window, where it must not.
    """
    from converter.cli.evaluation_tables import show_evaluation
    from converter.evaluation import run
    from converter.evaluation.harness import HarnessSettings
    from converter.evaluation.models import VariantSettings
    from converter.evaluation.tasks.table import TaskSettings

    placement = common.settings(options)
    settings = run.EvaluateSettings(
        model=run.ModelSettings(model, against, revision, common.offline, trust_remote_code),
        tasks=TaskSettings(_tasks(tasks), rows, _numbers(lengths), depths, samples, haystack, seed),
        variants=VariantSettings(_names(budgets), periodic, plans, against is not None),
        harness=HarnessSettings(_names(harness), harness_tasks, harness_limit),
        text=text,
        text_tokens=text_tokens,
        text_chunks=text_chunks,
        batch=batch_size,
        speed_runs=speed_runs,
        device=placement.device,
        dtype=placement.dtype,
        out=out,
        force=force,
        work=work,
        fresh=fresh,
    )
    return show_evaluation(common.console, *run.evaluate(settings, common.console.progress))


def _tasks(text: str) -> tuple[str, ...]:
    return () if text == "none" else _names(text)


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def _numbers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        numbers = tuple(int(part) for part in _names(text))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise UsageError(
            "the lengths cannot be read",
            where="--lengths",
            expected="token counts such as 1024,4096",
            got=repr(text),
        )
    return numbers
