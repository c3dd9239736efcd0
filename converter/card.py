"""The model card that ships in a checkpoint."""

from __future__ import annotations

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from converter import __version__
from converter.console import human_bytes
from converter.engines import verdicts
from converter.form import form_of
from converter.mask import SLIDING
from converter.plan import Plan, kv_bytes
from converter.quality import Quality
from converter.scores import Scores
from converter.shipped import shipped
from converter.source import Source


def render_card(source: Source, plan: Plan, scores: Scores | None, quality: Quality | None) -> str:
    """The card as Markdown with the Hub's metadata block."""
    environment = Environment(
        loader=FileSystemLoader(shipped("templates")),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        autoescape=False,  # noqa: S701 - Markdown, not HTML
    )
    environment.filters["bytes"] = human_bytes
    form = form_of(source, plan.mask)
    return environment.get_template("model_card.md.jinja").render(
        source=source,
        plan=plan,
        scores=scores,
        quality=quality,
        form=form,
        verdicts=verdicts(form),
        kv=kv_bytes(plan, source.shape, source.shape.context_tokens),
        sliding=plan.layer_types.count(SLIDING),
        version=__version__,
    )
