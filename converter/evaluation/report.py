"""The report: one page that opens from disk, without network or scripts, and the same as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converter.calibration.scores import Scores
from converter.common.drawing import DARK, LIGHT
from converter.common.errors import OutputError
from converter.common.files import (
    building,
    check_absent,
    finish_folder,
    is_empty_folder,
    restore_replaced,
    write_json,
    write_text,
)
from converter.common.resources import resource_dir
from converter.common.statistics import Estimate
from converter.common.units import human_bytes
from converter.evaluation.figures import compared, draw_figures, draw_heatmaps
from converter.evaluation.models import HYBRID, ORIGINAL
from converter.evaluation.summary import accuracy_text, difference_text
from converter.model.mask import Mask
from converter.plan.plan import plan_from_json

PAGE, NUMBERS = "report.html", "evaluation.json"


def check_report_place(out: Path, *, force: bool) -> None:
    """Refuse a place for the report that would cost the user something, before any work.

    Raises:
        OutputError: it exists and `force` is not set, or it is something else than a report.
    """
    restore_replaced(out)
    check_absent(out, force)
    if out.exists() and not (out / NUMBERS).is_file() and not is_empty_folder(out):
        raise OutputError(
            "--force replaces reports of ours only, and this is something else",
            where=out,
            next_step="choose another name, or remove it yourself",
        )


def write_report(out: Path, summary: Mapping[str, Any], scores: Scores | None) -> None:
    """Write the folder `out`: the page, and every number and answer as JSON.

    Raises:
        OutputError: the disk is full or may not be written to.
    """
    page = render_page(summary, scores)
    with building(out) as partial:
        write_text(partial / PAGE, page)
        write_json(partial / NUMBERS, summary)
        finish_folder(partial, out)


def render_page(summary: Mapping[str, Any], scores: Scores | None) -> str:
    """The page as HTML, from what `summarize` gave; the scores are for the layer map."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(resource_dir("templates")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
    )
    environment.filters |= {
        "bytes": human_bytes,
        "estimate": lambda value: " ± ".join(_mean_and_error(value)),
        "mean": lambda value: _mean_and_error(value)[0],
        "error": lambda value: _mean_and_error(value)[1],
        "share": accuracy_text,
        "change": difference_text,
        "interval": lambda value: str(Estimate(value["value"], value["stderr"])),
    }
    variants, plan = summary["variants"], summary["provenance"]["plan"]
    named = compared(variants)
    return environment.get_template("evaluation.html.jinja").render(
        summary=summary,
        variants=variants,
        named=named,
        others=[name for name in variants if name not in named],
        original=variants[ORIGINAL],
        hybrid=variants.get(HYBRID),
        plan=None if plan is None else plan_from_json(plan, "the report"),
        mask=None if summary["mask"] is None else str(Mask.from_json(summary["mask"], "report")),
        figures=draw_figures(summary, scores),
        heatmaps=draw_heatmaps(variants),
        # The figures are ours; what they quote of the model is escaped by matplotlib.
        inline=Markup,
        light=LIGHT,
        dark=DARK,
    )


def _mean_and_error(value: Mapping[str, Any]) -> list[str]:
    """Both with as many digits as the mean deserves."""
    size = abs(value["mean"])
    digits = 3 if size < 100 else 1 if size < 1000 else 0
    return ["?" if x is None else f"{x:.{digits}f}" for x in (value["mean"], value["stderr"])]
