"""The report's figures, each made from the summary alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converter.calibration.figures import head_map, layer_map
from converter.calibration.scores import Scores
from converter.calibration.selectors import PERIODIC
from converter.common.drawing import MARKS, draw_dot, drawing, legend_above, new_figure, to_svg
from converter.common.units import human_bytes
from converter.evaluation.models import HYBRID, ORIGINAL
from converter.model.mask import FULL, SLIDING

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.ticker import Formatter

Variants = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Drawn:
    """A figure of the report: its place in the page, what it is about and shows, and the SVG."""

    name: str
    title: str
    caption: str
    svg: str


@drawing()
def draw_figures(summary: Mapping[str, Any], scores: Scores | None) -> dict[str, list[Drawn]]:
    """Every figure but the heatmaps that the summary has numbers for, by section."""
    variants: Variants = summary["variants"]
    return {
        "layers": _layers(variants, scores),
        "tasks": _tasks(variants),
        "distance": _distance(variants),
        "budget": _budget(variants),
        "cost": _cost(variants),
        "selectors": _selectors(summary["selectors"]),
    }


def _drawn(name: str, title: str, caption: str, figure: Figure) -> Drawn:
    return Drawn(name, title, caption, to_svg(figure, name, f"{title}. {caption}"))


def compared(variants: Variants) -> list[str]:
    """Variants that are shown by name: not the periodic ones, which stand for chance."""
    named = [name for name, variant in variants.items() if variant["method"] != PERIODIC.name]
    # More lines than colours would not be told apart.
    return named[: len(MARKS.series)]


def _label_rows(axes: Any, labels: Sequence[str], margin: float) -> None:
    axes.set_yticks(range(len(labels)), labels, color=MARKS.ink)
    axes.set_ylim(len(labels) - 0.5 + margin, -0.5 - margin)
    axes.grid(axis="y", visible=False)


def _shift(place: int, count: int, step: float) -> float:
    """How far from the middle of its row or column one of several things is drawn."""
    return (place - (count - 1) / 2) * step


def _layers(variants: Variants, scores: Scores | None) -> list[Drawn]:
    if scores is None or HYBRID not in variants:
        return []
    kept, kinds = (variants[HYBRID][key] for key in ("full_attention_layers", "layer_types"))
    if not kinds:
        kinds = [FULL if i in kept else SLIDING for i in range(max(scores.layer_order) + 1)]
    caption = f"Scores by {scores.method} over {len(scores.examples)} calibration examples"
    title = "What each {}'s full attention is worth"
    if scores.units.of_heads:
        figure = head_map(scores, kinds, MARKS)
        return [_drawn("layers", title.format("KV head"), f"{caption}.", figure)]
    figure = layer_map(scores, kinds, MARKS)
    caption += ", with 95% intervals."
    return [_drawn("layers", title.format("layer"), caption, figure)]


@drawing()
def draw_heatmaps(variants: Variants) -> list[list[Drawn]]:
    """For each task the original, then every other variant and what it lost, in rows.

    A row of the page for the original and the plan, then one for each other plan.
    """
    names = compared(variants)
    rows: list[list[Drawn]] = []
    for number, task in enumerate(variants[names[0]]["heatmaps"]):
        each = sorted({cell["n"] for cell in variants[names[0]]["heatmaps"][task]})
        count = f"{each[0]} to {each[-1]}" if len(each) > 1 else f"{each[0]}"
        caption = "Share of right answers by prompt length and depth of the evidence; "
        caption += f"{count} items in each cell."
        base: dict[tuple[int, float], float] = {}
        for place, name in enumerate(names):
            cells = {
                (cell["length_tokens"], cell["depth"]): cell["accuracy"]
                for cell in variants[name]["heatmaps"][task]
            }
            base = base or cells
            if place != 1:
                rows.append([])
            key, title = f"heat-{number}-{place}", f"{task}: {name}"
            rows[-1].append(_drawn(key, title, caption, _heat(cells, signed=False)))
            if place > 0:
                figure = _heat({at: cells[at] - base[at] for at in cells}, signed=True)
                key, title = f"{key}-difference", f"{title} less original"
                rows[-1].append(_drawn(key, title, "Red is lost, green is won.", figure))
    return rows


def _heat(cells: Mapping[tuple[int, float], float], *, signed: bool) -> Figure:
    from matplotlib.patches import Rectangle

    lengths = sorted({length for length, _ in cells})
    depths = sorted({depth for _, depth in cells})
    figure, axes = new_figure(1.0 + 0.34 * len(depths), MARKS)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    for (length, depth), value in cells.items():
        x, y = lengths.index(length), depths.index(depth)
        colour = MARKS.heat if not signed else MARKS.loss if value < 0 else MARKS.gain
        # A change of a tenth must be seen.
        strength = 0.3 + 0.7 * abs(value) if signed and value else abs(value)
        for face, alpha in ((MARKS.grid, 0.35), (colour, min(1.0, strength))):
            axes.add_patch(
                Rectangle((x - 0.47, y - 0.45), 0.94, 0.9, facecolor=face, alpha=alpha, linewidth=0)
            )
        text = "0" if signed and not value else f"{value:+.2f}" if signed else f"{value:.2f}"
        axes.text(x, y, text, ha="center", va="center", color=MARKS.ink)
    axes.set(xlim=(-0.5, len(lengths) - 0.5), ylim=(len(depths) - 0.5, -0.5))
    axes.set(xlabel="tokens", ylabel="depth")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    return figure


def _tasks(variants: Variants) -> list[Drawn]:
    """Accuracy by task, and the paired difference to the original."""
    names = compared(variants)
    if not variants[names[0]]["tasks"]:
        return []
    figure, axes = _dots(variants, names, difference=False)
    axes.set_xlim(-0.03, 1.03)
    caption = "Mean share of references found in the answer, with 95% intervals."
    found = [_drawn("tasks", "Accuracy by task", caption, figure)]
    others = [name for name in names if name != ORIGINAL]
    if others:
        figure, axes = _dots(variants, others, difference=True)
        axes.axvline(0, color=MARKS.muted, linewidth=1)
        caption = (
            "Paired over the same items, with 95% intervals; an interval that holds zero shows no "
            "clear change."
        )
        title = "Change of accuracy against the original"
        found.append(_drawn("differences", title, caption, figure))
    return found


def _dots(variants: Variants, names: Sequence[str], *, difference: bool) -> tuple[Figure, Any]:
    """One row for each task, one dot with its interval for each variant."""
    tasks = list(variants[names[0]]["tasks"])
    colours = dict(zip(compared(variants), MARKS.series, strict=False))
    row_inches = 0.16 * len(names) + 0.14
    figure, axes = new_figure(0.9 + row_inches * len(tasks) + 0.2 * ((len(names) + 1) // 2), MARKS)
    for place, name in enumerate(names):
        for row, task in enumerate(tasks):
            found = variants[name]["tasks"][task]
            found = found["difference"] if difference else found
            value = found["mean" if difference else "accuracy"], found["low"], found["high"]
            y = row + _shift(place, len(names), 0.8 / len(names))
            draw_dot(axes, y, value, colours[name], name if row == 0 else None)
    _label_rows(axes, tasks, 0.05)
    legend_above(axes, MARKS)
    return figure, axes


def _distance(variants: Variants) -> list[Drawn]:
    names, rows = compared(variants), variants[ORIGINAL]["by_distance"]
    if not rows:
        return []
    figure, axes = new_figure(2.7, MARKS)
    for place, (name, colour) in enumerate(zip(names, MARKS.series, strict=False)):
        xs = [i + _shift(place, len(names), 0.1) for i in range(len(rows))]
        losses = [row["nll"] for row in variants[name]["by_distance"]]
        means = [loss["mean"] for loss in losses]
        axes.plot(xs, means, marker="o", markersize=4.5, color=colour, linewidth=1.4, label=name)
        for x, loss in zip(xs, losses, strict=True):
            # Two errors and not 95%, as a few distances have a few items only.
            reach = 2 * (loss["stderr"] or 0.0)
            # A loss is never below zero.
            ends = [max(0.0, loss["mean"] - reach), loss["mean"] + reach]
            axes.plot([x, x], ends, color=colour, linewidth=1.2)
    labels = [f"{row['above_tokens'] + 1}–{row['up_to_tokens']}" for row in rows]
    axes.set_xticks(range(len(rows)), labels)
    axes.set_xlabel("tokens between the evidence and the answer")
    axes.set_ylabel("loss (nats per token)")
    legend_above(axes, MARKS)
    caption = "On the answers' tokens; bars reach two standard errors to each side. "
    caption += ", ".join(f"{row['n']}" for row in rows) + " items."
    return [_drawn("distance", "Loss by distance from the evidence", caption, figure)]


def _budget(variants: Variants) -> list[Drawn]:
    """Quality against the share of the KV cache that is left, one colour for each selector."""
    original = variants[ORIGINAL]
    if len(variants) < 3 or original["overall"] is None:
        return []
    full = original["cost"][-1]
    figure, axes = new_figure(2.9, MARKS)
    # The original first and chance last, so that colours mean the same as elsewhere.
    methods = dict.fromkeys(variant["method"] for variant in variants.values())
    ordered = sorted(methods, key=lambda method: method == PERIODIC.name)
    for method, colour in zip(ordered, (*MARKS.series, *MARKS.series), strict=False):
        mine = [v for v in variants.values() if v["method"] == method]
        points = [(v["cost"][-1]["kv_bytes"] / full["kv_bytes"], v["overall"]) for v in mine]
        points.sort(key=lambda point: point[0])
        chance = method == PERIODIC.name
        for x, overall in points if not chance else ():
            axes.plot([x, x], [overall["low"], overall["high"]], color=colour, linewidth=1.4)
        axes.plot(
            [x for x, _ in points],
            [overall["accuracy"] for _, overall in points],
            marker="x" if chance else "o",
            markersize=5,
            linestyle="none" if chance or len(points) == 1 else "-",
            linewidth=1.4,
            color=colour,
            label="every layer" if method == "all" else method,
        )
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    axes.set_xlabel(f"KV cache at {full['context_tokens']:,} tokens, of the original")
    axes.set(ylim=(-0.04, 1.06), ylabel="accuracy, all tasks")
    legend_above(axes, MARKS)
    caption = (
        "Accuracy over all items with 95% intervals, by how the full-attention layers were chosen; "
        "crosses are evenly spaced layers, one for each offset."
    )
    return [_drawn("budget", "Quality against budget", caption, figure)]


def _cost(variants: Variants) -> list[Drawn]:
    """KV bytes and prefill operations by context."""
    from matplotlib.ticker import EngFormatter, FuncFormatter

    held = "Bytes of keys and values of one sequence, by formula."
    work = "Floating-point operations of one prompt's matrix products, by formula."
    in_bytes, in_flop = FuncFormatter(lambda x, _: human_bytes(int(x))), EngFormatter("FLOP")
    return [
        _by_context(variants, "kv_bytes", "KV cache by context", held, in_bytes),
        _by_context(variants, "prefill_flop", "Prefill work by context", work, in_flop),
    ]


def _by_context(variants: Variants, key: str, title: str, caption: str, unit: Formatter) -> Drawn:
    """One line for each number of full-attention layers, as cost depends on nothing else."""
    by_count = {v["full_layers"]: v["cost"] for v in variants.values()}
    total = max(by_count)
    figure, axes = new_figure(2.6, MARKS)
    for count, colour in zip(sorted(by_count, reverse=True), MARKS.series, strict=False):
        axes.plot(
            [cost["context_tokens"] for cost in by_count[count]],
            [cost[key] for cost in by_count[count]],
            marker="o",
            markersize=3.5,
            linewidth=1.6,
            color=colour,
            label=f"{count:.3g} of {total} layers full",
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda value, _: f"{int(value):,}")
    axes.yaxis.set_major_formatter(unit)
    axes.set_xlabel("context (tokens)")
    legend_above(axes, MARKS)
    return _drawn(key.replace("_", "-"), title, caption, figure)


def _selectors(rows: Sequence[Mapping[str, Any]]) -> list[Drawn]:
    if not rows:
        return []
    figure, axes = new_figure(0.8 + 0.27 * len(rows), MARKS)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    colours = dict(zip(methods, (*MARKS.series[1:], *MARKS.series), strict=False))
    for place, row in enumerate(rows):
        value = row["accuracy"], row["low"], row["high"]
        draw_dot(axes, place, value, colours[row["method"]])
    _label_rows(axes, [row["variant"] for row in rows], 0.1)
    axes.set(xlim=(-0.03, 1.03), xlabel="accuracy, all tasks")
    title = "Ways of choosing as many layers"
    caption = (
        "Accuracy over all items with 95% intervals, plans of the same number of full layers "
        "together."
    )
    return [_drawn("selectors", title, caption, figure)]
