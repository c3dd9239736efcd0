"""The picture of the comparison of selectors: how much of the gap each closes, at each budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from selectors_results import Results, Score

from converter.calibration.selectors import BEST
from converter.common.drawing import LIGHT, Palette, drawing, new_figure, to_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = "os^Dv"
# How far a row's dots spread, so that those of equal value lie beside each other; rows are 1 apart.
_SPREAD = 0.8
_ROW_INCHES = 0.25
# Offsets are drawn as a band behind the rows.
_BAND = ("periodic, worst offset", "periodic, best offset")
_LINE = "periodic, mean of offsets"


def write_picture(results: Results, path: Path) -> None:
    """Draw into a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with drawing():
        path.write_bytes(to_png(selectors_figure(results, LIGHT), LIGHT))


def selectors_figure(results: Results, palette: Palette) -> Figure:
    """Share of the loss between all sliding (0) and the original (100) that is won back.

    A panel for each budget, a row for each way of choosing, best first, a dot for each model. The
    band reaches from the mean over models of the worst offset of evenly spaced layers to that of
    the best, with a line at the mean of offsets.
    """
    budgets = list(results.models[0].budgets)
    scores = {
        budget: [model.budgets[budget].scores() for model in results.models] for budget in budgets
    }
    names = [name for name in results.ways() if name not in (*_BAND, _LINE)]
    height = 1.25 + _ROW_INCHES * len(names)
    figure, _ = new_figure(height, palette, columns=len(budgets))
    first = figure.axes[0]
    for axes, budget in zip(figure.axes, budgets, strict=True):
        _band(axes, scores[budget], palette)
        _dots(axes, scores[budget], names, [model.name for model in results.models], palette)
        _dress(axes, f"keeps {budget}", names, palette)
        axes.set_xlim(min(-0.06, _lowest(scores, names) - 0.06), 1.08)
    first.set_yticklabels([name.removesuffix(", mean of seeds") for name in names])
    first.get_yticklabels()[names.index(BEST)].set_color(palette.full)
    figure.supxlabel(
        "loss won back, % of what sliding in every layer costs", color=palette.muted, fontsize=10
    )
    handles, _ = first.get_legend_handles_labels()
    figure.legend(
        labelcolor=palette.ink,
        handles=handles,
        loc="outside upper left",
        ncols=3,
        fontsize=9.5,
        handletextpad=0.4,
        columnspacing=1.2,
    )
    return figure


def _lowest(scores: dict[str, list[dict[str, Score]]], names: Sequence[str]) -> float:
    return min(cell[name].closed for found in scores.values() for cell in found for name in names)


def _band(axes: Any, cells: Sequence[dict[str, Score]], palette: Palette) -> None:
    low, high = (fmean(cell[name].closed for cell in cells) for name in _BAND)
    label = "periodic, worst to best"
    axes.axvspan(low, high, color=palette.slide, alpha=0.35, linewidth=0, label=label)
    mean = fmean(cell[_LINE].closed for cell in cells)
    axes.axvline(mean, color=palette.muted, linewidth=0.8, label="periodic, mean offset")


def _dots(
    axes: Any,
    cells: Sequence[dict[str, Score]],
    names: Sequence[str],
    models: Sequence[str],
    palette: Palette,
) -> None:
    colours = (*palette.series[1:], palette.series[0])
    for number, (model, cell) in enumerate(zip(models, cells, strict=True)):
        shift = _SPREAD * ((number + 0.5) / len(models) - 0.5)
        axes.plot(
            [cell[name].closed for name in names],
            [row + shift for row in range(len(names))],
            linestyle="none",
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=3.2,
            color=colours[number % len(colours)],
            label=model,
        )


def _dress(axes: Any, title: str, names: Sequence[str], palette: Palette) -> None:
    axes.set_title(title, color=palette.ink, loc="left")
    axes.set_xticks([0, 0.5, 1], ["0", "50", "100"])
    axes.set_yticks(range(len(names)), [""] * len(names), color=palette.ink, fontsize=9.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    # Lines between the rows, so that it is seen which dots belong together.
    axes.set_yticks([row + 0.5 for row in range(len(names))], minor=True)
    axes.tick_params(which="minor", length=0)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="y", which="minor", color=palette.grid, linewidth=0.8)
