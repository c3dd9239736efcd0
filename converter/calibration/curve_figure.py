"""The picture of quality against budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from converter.calibration.curve import Curve, Point
from converter.common.drawing import Palette, legend, new_figure
from converter.common.units import human_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Standard errors to each side of a mean that hold 95% of a normal distribution.
_NORMAL_95 = 1.96
# Losses up to this are drawn to scale, larger ones by their logarithm: a plan worth choosing loses
# hundredths of a nat, one that slides everywhere several nats.
_LINEAR_NATS = 0.1
_LOSS_TICKS = (-10, -3, -1, -0.3, -0.1, 0, 0.05, 0.1, 0.3, 1, 3, 10, 30)
# More ways of choosing than colours differ in their marks and lines.
_MARKS = (("o", "-"), ("s", "--"), ("^", ":"))

# Reads a point's value with its interval: value, low, high.
_Read = Callable[[Point], tuple[float, float, float]]


def pareto_figure(curve: Curve, palette: Palette) -> Figure:
    """Loss above the original and answers right, against the share of the KV cache that is left.

    One colour for each way of choosing, with 95% intervals; filled points are on the front. A band
    spans the evenly spaced plans, from the best offset to the worst. Where sliding frees no cache
    (full attention in decode) the share of full layers takes its place.
    """
    legend_rows = math.ceil((len(curve.choices()) + 2) / 2)
    figure, (upper, lower) = new_figure(4.9 + 0.23 * legend_rows, palette, rows=2)
    across = _axis(curve)
    for axes, read in ((upper, _loss), (lower, _right)):
        picture = _Panel(axes, palette, across.place, read)
        picture.draw(curve)
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
    lower.set_xlabel(across.label)
    upper.plot([], [], "o", markersize=4.5, color=palette.ink, label="filled: on the front")
    handles, _ = upper.get_legend_handles_labels()
    legend(figure, palette, handles=handles, loc="outside upper left", ncols=2)
    return figure


@dataclass(frozen=True)
class _Axis:
    """Where points lie from left to right, and what that means."""

    place: Callable[[Point], float]
    label: str


def _axis(curve: Curve) -> _Axis:
    if any(point.kv_share < 1 for point in curve.points):
        size = human_bytes(curve.original.kv_bytes)
        label = f"KV cache, of {size} at {curve.context_tokens:,} tokens"
        return _Axis(lambda point: point.kv_share, label)
    return _Axis(
        lambda point: point.count / curve.layers,
        f"full layers, of {curve.layers} (the KV cache stays whole)",
    )


def _loss(point: Point) -> tuple[float, float, float]:
    reach = _NORMAL_95 * (point.loss.stderr or 0.0)
    return point.loss.mean, point.loss.mean - reach, point.loss.mean + reach


def _right(point: Point) -> tuple[float, float, float]:
    return point.right.accuracy, point.right.low, point.right.high


@dataclass(frozen=True)
class _Panel:
    """One of the two pictures: axes, and what they show of a point."""

    axes: Any
    palette: Palette
    place: Callable[[Point], float]
    read: _Read

    def draw(self, curve: Curve) -> None:
        """The band, a line for each way of choosing, and the two ends that all share."""
        self._band(list(curve.periodic().values()))
        colours = (*self.palette.series[1:], self.palette.series[0])
        looks = [(colour, *mark) for mark, colour in product(_MARKS, colours)]
        for number, (name, points) in enumerate(curve.choices().items()):
            colour, marker, style = looks[number % len(looks)]
            line = sorted((*points, *curve.ends), key=self.place)
            self.axes.plot(
                [self.place(point) for point in line],
                [self.read(point)[0] for point in line],
                color=colour,
                linestyle=style,
                linewidth=1.2,
                label=name,
            )
            for point in points:
                self._point(point, colour, marker)
        for point in curve.ends:
            self._point(point, self.palette.ink, "o")

    def _band(self, groups: list[tuple[Point, ...]]) -> None:
        """From the best to the worst offset of every number of full layers."""
        if not groups:
            return
        values = [[self.read(point)[0] for point in group] for group in groups]
        self.axes.fill_between(
            [self.place(group[0]) for group in groups],
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
        value, low, high = self.read(point)
        x = self.place(point)
        self.axes.plot([x, x], [low, high], color=colour, linewidth=1.0, alpha=0.7)
        self.axes.plot(
            [x],
            [value],
            marker=marker,
            markersize=4.5,
            color=colour,
            markerfacecolor=colour if point.on_front else self.palette.paper,
            zorder=3,
        )


def _scale_loss(axes: Any, curve: Curve) -> None:
    """To scale near zero, by logarithm above; to scale altogether where all losses are small."""
    reach = [value for point in curve.points for value in _loss(point)]
    low, high = min(reach), max(reach)
    if high <= _LINEAR_NATS:
        return
    axes.set_yscale("symlog", linthresh=_LINEAR_NATS, linscale=0.8)
    bottom, top = min(1.2 * low, -0.02), 1.3 * high
    axes.set_ylim(bottom, top)
    axes.set_yticks([tick for tick in _LOSS_TICKS if bottom <= tick <= top])
    axes.set_yticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
