"""The pictures: what each layer is worth, what a plan cost, and quality against budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from converter.calibration.curve import Curve, Point
from converter.calibration.results import Quality
from converter.calibration.scores import Scores
from converter.common.drawing import (
    LIGHT,
    Palette,
    draw_dot,
    drawing,
    legend_above,
    new_figure,
    to_png,
)
from converter.common.units import human_bytes
from converter.model.mask import FULL, full_kv_heads
from converter.plan.plan import Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAYERS_PICTURE = "hybrid/layers.png"
QUALITY_PICTURE = "hybrid/quality.png"
CURVE_PICTURE = "hybrid/curve.png"
# Losses up to this are drawn to scale, larger ones by their logarithm: a plan worth choosing loses
# hundredths of a nat, one that slides everywhere several nats.
_LINEAR_NATS = 0.1
_LOSS_TICKS = (-10, -3, -1, -0.3, -0.1, 0, 0.05, 0.1, 0.3, 1, 3, 10, 30)
_CAPTION_COLUMNS = 60
# Scores are written into the map of KV heads where there are no more layers.
_MOST_WRITTEN = 16
# More ways of choosing than colours differ in their marks and lines.
_MARKS = (("o", "-"), ("s", "--"), ("^", ":"))


def pictures(
    plan: Plan, scores: Scores | None, quality: Quality | None, curve: Curve | None
) -> dict[str, bytes]:
    """What was measured as PNG files, by relative path."""
    if scores is None and quality is None:
        return {}
    figures = {}
    with drawing():
        if scores is not None:
            draw = head_map if scores.units.of_heads else layer_map
            figures[LAYERS_PICTURE] = draw(scores, plan.layer_types, LIGHT)
        if quality is not None:
            figures[QUALITY_PICTURE] = quality_figure(quality, LIGHT)
        if curve is not None:
            figures[CURVE_PICTURE] = pareto_figure(curve, LIGHT)
        return {path: to_png(figure, LIGHT) for path, figure in figures.items()}


def layer_map(measured: Scores, layer_types: Sequence[str], palette: Palette) -> Figure:
    """Each layer's score with its 95% interval, full and sliding layers in two colours."""
    scores = dict(zip(measured.numbers, measured.estimates, strict=True))
    note = wrap(one_at_a_time(measured), _CAPTION_COLUMNS)
    figure, axes = new_figure(2.4 + 0.2 * len(note), palette)
    for full, colour, label in (
        (True, palette.full, "keeps full attention"),
        (False, palette.slide, "slides"),
    ):
        mine = {i: s for i, s in scores.items() if (layer_types[i] == FULL) == full}
        if mine:
            heights = [score.mean for score in mine.values()]
            axes.bar(list(mine), heights, width=0.72, color=colour, label=label)
    for index, score in scores.items():
        if score.stderr is not None:
            axes.plot([index] * 2, [score.low, score.high], color=palette.ink, linewidth=1.2)
    axes.axhline(0, color=palette.muted, linewidth=0.8)
    axes.grid(axis="x", visible=False)
    axes.set_xlim(-0.6, len(layer_types) - 0.4)
    step = max(1, round(len(layer_types) / 12))
    axes.set_xticks(range(0, len(layer_types), step))
    axes.set_xlabel("\n".join(["layer", *note]))
    axes.set_ylabel(f"{measured.method}\n({measured.unit})")
    legend_above(axes, palette)
    return figure


def one_at_a_time(measured: Scores) -> str:
    """Why layers of lower scores may be the ones that were chosen; nothing where they are not."""
    if measured.by_mean:
        return ""
    compared, units = measured.comparison, measured.units
    chooser = measured.method if compared is None else measured.chosen_by(compared.keep)
    return (
        f"Scores are of one {'KV head' if units.of_heads else 'layer'} at a time; {chooser} chose "
        f"{units} together, so others than the highest may stay full."
    )


def head_map(measured: Scores, layer_types: Sequence[str], palette: Palette) -> Figure:
    """Layers by KV heads: which attend fully and which slide, with each one's score within."""
    heads = measured.kv_heads
    figure, axes = new_figure(0.9 + 0.28 * heads, palette)
    for number, score in zip(measured.numbers, measured.estimates, strict=True):
        layer, head = divmod(number, heads)
        full = head in full_kv_heads(layer_types[layer], heads)
        colour = palette.full if full else palette.slide
        axes.barh(head, 0.92, left=layer - 0.46, height=0.86, color=colour)
        if len(layer_types) <= _MOST_WRITTEN:
            text, ink = f"{score.mean:.2f}", palette.paper if full else palette.ink
            axes.text(layer, head, text, ha="center", va="center", fontsize=6, color=ink)
    for colour, label in ((palette.full, "attends fully"), (palette.slide, "slides")):
        axes.bar(0, 0, color=colour, label=label)
    axes.grid(visible=False)
    axes.set_xlim(-0.6, len(layer_types) - 0.4)
    axes.set_ylim(heads - 0.5, -0.5)
    axes.set_xticks(range(0, len(layer_types), max(1, round(len(layer_types) / 12))))
    axes.set_yticks(range(heads))
    axes.set_xlabel(f"layer ({measured.method}, {measured.unit})")
    axes.set_ylabel("KV head")
    legend_above(axes, palette)
    return figure


def quality_figure(quality: Quality, palette: Palette) -> Figure:
    """Answer loss above the original and answers right, with 95% intervals, for every plan."""
    outcomes = quality.outcomes
    figure, (right, loss) = new_figure(0.9 + 0.26 * len(outcomes), palette, columns=2)
    names = [outcome.name for outcome in outcomes]
    for axes, title in ((right, "answers right"), (loss, "loss above the original")):
        axes.set_yticks(range(len(names)), names, color=palette.ink)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_title(title, color=palette.ink, loc="left")
    loss.set_yticklabels([])
    right.set_xlim(-0.04, 1.04)
    loss.set_xlabel("nats per answer token")
    for row, outcome in enumerate(outcomes):
        colour = palette.full if outcome is quality.hybrid else palette.muted
        share, above = outcome.accuracy, outcome.loss_above(quality.original)
        draw_dot(right, row, (share.accuracy, share.low, share.high), colour)
        draw_dot(loss, row, (above.mean, above.low, above.high), colour)
    return figure


def pareto_figure(curve: Curve, palette: Palette) -> Figure:
    """Loss above the original and answers right, against the share of the KV cache that is left.

    One colour for each way of choosing, with 95% intervals; a band spans the evenly spaced plans.
    Where sliding frees no cache (full attention in decode) the share of full layers replaces it.
    """
    legend_rows = math.ceil((len(curve.choices()) + 2) / 2)
    figure, (upper, lower) = new_figure(4.9 + 0.23 * legend_rows, palette, rows=2)
    frees_cache = any(point.kv_share < 1 for point in curve.points)
    for axes, read in (
        (upper, lambda point: (point.loss.mean, point.loss.low, point.loss.high)),
        (lower, lambda point: (point.right.accuracy, point.right.low, point.right.high)),
    ):
        _Panel(axes, palette, read, curve, frees_cache).draw()
        axes.set_xlim(-0.02, 1.03)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    upper.set_xticklabels([])
    upper.set_ylabel("loss above the original\n(nats per answer token)")
    upper.axhline(0, color=palette.muted, linewidth=0.8)
    _scale_loss(upper, curve)
    lower.axhline(curve.original.right.accuracy, color=palette.muted, linewidth=0.8)
    lower.set_ylim(-0.04, 1.04)
    lower.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    lower.set_ylabel("answers right")
    size = human_bytes(curve.original.kv_bytes)
    lower.set_xlabel(
        f"KV cache, of {size} at {curve.context_tokens:,} tokens"
        if frees_cache
        else f"full {curve.units}, of {curve.units.total} (the KV cache stays whole)"
    )
    upper.plot([], [], "o", markersize=4.5, color=palette.ink, label="filled: on the front")
    handles, _ = upper.get_legend_handles_labels()
    figure.legend(handles=handles, loc="outside upper left", ncols=2, labelcolor=palette.ink)
    return figure


@dataclass(frozen=True)
class _Panel:
    """Axes, and what they show of a point: value, low, high."""

    axes: Any
    palette: Palette
    read: Callable[[Point], tuple[float, float, float]]
    curve: Curve
    frees_cache: bool

    def draw(self) -> None:
        """The band, a line for each way of choosing, and the two ends that all share."""
        self._band(list(self.curve.periodic().values()))
        colours = (*self.palette.series[1:], self.palette.series[0])
        looks = [(colour, *mark) for mark, colour in product(_MARKS, colours)]
        for number, (name, points) in enumerate(self.curve.choices().items()):
            colour, marker, style = looks[number % len(looks)]
            line = sorted((*points, *self.curve.ends), key=self._across)
            self.axes.plot(
                [self._across(point) for point in line],
                [self.read(point)[0] for point in line],
                color=colour,
                linestyle=style,
                linewidth=1.2,
                label=name,
            )
            for point in points:
                self._point(point, colour, marker)
        for point in self.curve.ends:
            self._point(point, self.palette.ink, "o")

    def _across(self, point: Point) -> float:
        return point.kv_share if self.frees_cache else point.count / self.curve.units.total

    def _band(self, groups: list[tuple[Point, ...]]) -> None:
        if not groups:
            return
        values = [[self.read(point)[0] for point in group] for group in groups]
        self.axes.fill_between(
            [self._across(group[0]) for group in groups],
            [min(found) for found in values],
            [max(found) for found in values],
            color=self.palette.slide,
            alpha=0.4,
            linewidth=1.5,
            label="evenly spaced, every offset",
        )
        for point in (point for group in groups for point in group if point.on_front):
            self._point(point, self.palette.muted, "D")

    def _point(self, point: Point, colour: str, marker: str) -> None:
        (value, low, high), x = self.read(point), self._across(point)
        self.axes.plot([x, x], [low, high], color=colour, linewidth=1.0, alpha=0.7)
        face = colour if point.on_front else self.palette.paper
        self.axes.plot(
            [x], [value], marker, markersize=4.5, color=colour, markerfacecolor=face, zorder=3
        )


def _scale_loss(axes: Any, curve: Curve) -> None:
    """To scale near zero, by logarithm above; to scale altogether where all losses are small."""
    low = min(point.loss.low for point in curve.points)
    high = max(point.loss.high for point in curve.points)
    if high <= _LINEAR_NATS:
        return
    axes.set_yscale("symlog", linthresh=_LINEAR_NATS, linscale=0.8)
    bottom, top = min(1.2 * low, -0.02), 1.3 * high
    axes.set_ylim(bottom, top)
    axes.set_yticks([tick for tick in _LOSS_TICKS if bottom <= tick <= top])
    axes.set_yticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
