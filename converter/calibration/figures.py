"""The two pictures of a model card: what each layer is worth, and what the plan cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from converter.calibration.results import Quality
from converter.calibration.scores import Scores
from converter.common.drawing import LIGHT, Palette, drawing, legend, new_figure, to_png
from converter.model.mask import FULL
from converter.plan.plan import Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAYERS_PICTURE = "hybrid/layers.png"
QUALITY_PICTURE = "hybrid/quality.png"
# Standard errors to each side of a mean that hold 95% of a normal distribution.
_NORMAL_95 = 1.96


def pictures(plan: Plan, scores: Scores | None, quality: Quality | None) -> dict[str, bytes]:
    """What was measured as PNG files, by relative path: none, one or both."""
    drawn: dict[str, bytes] = {}
    if scores is None and quality is None:
        return drawn
    with drawing():
        if scores is not None:
            figure = layer_map(scores, plan.layer_types, LIGHT)
            drawn[LAYERS_PICTURE] = to_png(figure, LIGHT)
        if quality is not None:
            drawn[QUALITY_PICTURE] = to_png(quality_figure(quality, LIGHT), LIGHT)
    return drawn


def layer_map(measured: Scores, layer_types: Sequence[str], palette: Palette) -> Figure:
    """Each layer's score with its 95% interval, full and sliding layers in two colours."""
    scores = measured.layers
    figure, axes = new_figure(2.4, palette)
    for kind, colour, label in (
        (True, palette.full, "keeps full attention"),
        (False, palette.slide, "slides"),
    ):
        mine = [i for i, name in enumerate(layer_types) if (name == FULL) == kind]
        if mine:
            axes.bar(mine, [scores[i].mean for i in mine], width=0.72, color=colour, label=label)
    for index, score in enumerate(scores):
        if score.stderr is not None:
            reach = _NORMAL_95 * score.stderr
            axes.plot(
                [index, index],
                [score.mean - reach, score.mean + reach],
                color=palette.ink,
                linewidth=1.2,
            )
    axes.axhline(0, color=palette.muted, linewidth=0.8)
    axes.grid(axis="x", visible=False)
    axes.set_xlim(-0.6, len(scores) - 0.4)
    step = max(1, round(len(scores) / 12))
    axes.set_xticks(range(0, len(scores), step))
    axes.set_xlabel("layer")
    axes.set_ylabel(f"{measured.method}\n({measured.unit})")
    legend(axes, palette, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
    return figure


def quality_figure(quality: Quality, palette: Palette) -> Figure:
    """Answer loss above the original and answers right, with 95% intervals, for every plan."""
    outcomes = quality.outcomes
    figure, both = new_figure(0.9 + 0.26 * len(outcomes), palette, columns=2)
    names = [outcome.name for outcome in outcomes]
    for axes, title in zip(both, ("answers right", "loss above the original"), strict=True):
        axes.set_yticks(range(len(names)), names, color=palette.ink)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_title(title, color=palette.ink, loc="left")
    both[1].set_yticklabels([])
    both[0].set_xlim(-0.04, 1.04)
    both[1].set_xlabel("nats per answer token")
    for row, outcome in enumerate(outcomes):
        colour = palette.full if outcome is quality.hybrid else palette.muted
        share = outcome.accuracy
        _dot(both[0], row, share.accuracy, share.low, share.high, colour)
        above = outcome.loss_above(quality.original)
        reach = _NORMAL_95 * (above.stderr or 0.0)
        _dot(both[1], row, above.mean, above.mean - reach, above.mean + reach, colour)
    return figure


def _dot(axes: Any, row: float, value: float, low: float, high: float, colour: str) -> None:
    axes.plot([low, high], [row, row], color=colour, linewidth=2, solid_capstyle="round")
    axes.plot([value], [row], marker="o", markersize=5.5, color=colour)
