"""The model card of a checkpoint.

Names, methods and whatever else comes from files is text, not Markdown: every expression of the
template is escaped unless it is `Markdown`, which only this file makes.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from converter import __version__
from converter.calibration.curve import Curve
from converter.calibration.figures import pictures
from converter.calibration.results import Quality
from converter.calibration.scores import Scores
from converter.checkpoint.format import (
    CARD_FILE,
    CURVE_FILE,
    QUALITY_FILE,
    SCORES_FILE,
    format_of_plan,
)
from converter.common.files import to_text
from converter.common.resources import resource_dir
from converter.common.units import human_bytes
from converter.engines.support import verdicts
from converter.model.mask import SLIDING
from converter.model.source import Source
from converter.plan.plan import Plan, kv_bytes
from converter.publish.metadata import is_hub_id, licence_of, write_metadata

_TAGS = ("hybrid-attention", "sliding-window-attention", "hybridize")
# What means something to Markdown or HTML anywhere in a line.
_SPECIAL = re.compile(r"([\\`*_\[\]{}()#|~!$])")
_LONGEST_TEXT = 200
# Our part of a card that somebody edits lies between these lines, which the Hub does not show.
_BEGIN = "<!-- From here on hybridize writes: retarget writes it anew. -->"
_END = "<!-- Up to here hybridize writes. -->"


class Markdown(str):
    """Text that is Markdown already."""

    __slots__ = ()


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def escaped(value: Any) -> Any:
    """Text from outside as Markdown that shows it and does nothing else, on one line."""
    if not isinstance(value, str) or isinstance(value, Markdown):
        return value
    line = " ".join(_printable(value).split())[:_LONGEST_TEXT]
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return Markdown(_SPECIAL.sub(r"\\\1", line))


def code_span(value: object) -> Markdown:
    """Text from outside between backticks, which it cannot close."""
    shown = _printable(str(value).replace("`", "'"))[:_LONGEST_TEXT].replace("|", "/")
    return Markdown(f"`{shown.strip() or ' '}`")


def card_metadata(source: Source, plan: Plan) -> dict[str, Any]:
    """The metadata block: what the Hub shows, links and searches by.

    `base_model` is a name on the Hub, so a source that was a folder has none: `hybridize push`
    asks for it.
    """
    hub_id = source.name if is_hub_id(source.name) else None
    base = {"base_model": hub_id, "base_model_relation": "finetune"} if hub_id else {}
    form = format_of_plan(source, plan)
    own_code = () if form.native else ("custom_code",)
    return {
        **base,
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text" if form.multimodal else "text-generation",
        **licence_of(source.folder, hub_id),
        "tags": [*_TAGS, *own_code],
    }


def render_card(
    source: Source,
    plan: Plan,
    scores: Scores | None,
    quality: Quality | None,
    curve: Curve | None = None,
) -> str:
    """The card as Markdown with the Hub's metadata block."""
    environment = Environment(
        loader=FileSystemLoader(resource_dir("templates")),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        autoescape=False,  # noqa: S701 - Markdown, not HTML: `escaped` sees to both
        finalize=escaped,
    )
    environment.filters |= {"bytes": human_bytes, "markdown": Markdown, "code": code_span}
    comparison = None if scores is None else scores.comparison
    kept = len(plan.full_attention_layers)
    page = "https://huggingface.co/" + quote(source.name)
    return environment.get_template("model_card.md.jinja").render(
        begin=Markdown(_BEGIN),
        end=Markdown(_END),
        metadata=Markdown(write_metadata(card_metadata(source, plan))),
        link=Markdown(page) if is_hub_id(source.name) else None,
        source=source,
        plan=plan,
        scores=scores,
        # Of plans of another size it says nothing.
        compared=comparison if comparison is not None and comparison.keep == kept else None,
        kinds=list(dict.fromkeys(e.kind for e in scores.examples)) if scores else [],
        quality=quality,
        curve=curve,
        form=format_of_plan(source, plan),
        verdicts=verdicts(source, plan.mask, by_heads=plan.is_mixed),
        kv=kv_bytes(plan, source.shape, source.shape.context_tokens),
        sliding=plan.layer_types.count(SLIDING),
        heads=plan.head_strips(source.shape.kv_heads) if plan.is_mixed else [],
        version=__version__,
    )


def extra_files(
    source: Source,
    plan: Plan,
    scores: Scores | None,
    quality: Quality | None,
    curve: Curve | None,
    edited: str | None = None,
) -> dict[str, bytes]:
    """What a checkpoint holds beside the model, by path: the card, and what was measured.

    `edited` is the card that it had, where somebody edited that: only our part of it changes.
    """
    card = render_card(source, plan, scores, quality, curve)
    files = {str(CARD_FILE): (card if edited is None else with_our_part(edited, card)).encode()}
    for path, measured in (
        (SCORES_FILE, scores),
        (QUALITY_FILE, quality),
        (CURVE_FILE, curve),
    ):
        if measured is not None:
            files[str(path)] = to_text(measured.to_json()).encode()
    return files | pictures(plan, scores, quality, curve)


def with_our_part(edited: str, card: str) -> str:
    """An edited card with the part between our two lines from another card; as it is without them.

    What stands around the lines, the metadata among it, is its author's.
    """
    before, begin, rest = edited.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        return edited
    return before + card[card.index(_BEGIN) : card.index(_END)] + _END + after
