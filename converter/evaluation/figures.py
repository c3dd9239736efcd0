"""The report's figures, each made from the summary alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converter.calibration.figures import layer_map
from converter.calibration.scores import Scores
from converter.calibration.selectors import PERIODIC
from converter.common.drawing import MARKS, draw_dot, drawing, legend_above, new_figure, to_svg
from converter.common.units import human_bytes
from converter.evaluation.variants import HYBRID, ORIGINAL
from converter.plan.plan import layer_types_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Variants = Mapping[str, Mapping[str, Any]]
# Not 95%: a few distances have a few items only.
_STANDARD_ERRORS = 2
# More lines than colours would not be told apart.
_MOST_LINES = len(MARKS.series)


@dataclass(frozen=True)
class Drawn:
    """A figure of the report.

    Attributes:
        name: its place in the page.
        title: what it is about.
        caption: what it shows, in words.
        svg: the figure.
    """

    name: str
    title: str
    caption: str
    svg: str


def draw_figures(summary: Mapping[str, Any], scores: Scores | None) -> dict[str, list[Drawn]]:
    """Every figure that the summary has numbers for, by section."""
    variants: Variants = summary["variants"]
    with drawing():
        return {
            "layers": _layers(summary, scores),
            # A row of the page for the original and the plan, then one for each other plan.
            **{f"heatmaps {i}": row for i, row in enumerate(_heatmaps(variants))},
            "tasks": _tasks(variants),
            "distance": _distance(variants),
            "budget": _budget(summary),
            "cost": _cost(variants),
            "selectors": _selectors(summary["selectors"]),
        }


def _drawn(name: str, title: str, caption: str, figure: Figure) -> Drawn:
    return Drawn(name, title, caption, to_svg(figure, name, f"{title}. {caption}"))


def compared(variants: Variants) -> list[str]:
    """Variants that are shown by name: not the periodic ones, which stand for chance."""
    named = [name for name, variant in variants.items() if variant["method"] != PERIODIC.name]
    return named[:_MOST_LINES]


def _colours(names: Sequence[str]) -> dict[str, str]:
    return dict(zip(names, MARKS.series, strict=False))


def _layers(summary: Mapping[str, Any], scores: Scores | None) -> list[Drawn]:
    if scores is None or HYBRID not in summary["variants"]:
        return []
    kept = summary["variants"][HYBRID]["full_attention_layers"]
    kinds = layer_types_of(kept, len(scores.layers))
    return [
        _drawn(
            "layers",
            "What each layer's full attention is worth",
            f"Scores by {scores.method} over {len(scores.examples)} calibration examples, with 95% "
            "intervals.",
            layer_map(scores, kinds, MARKS),
        )
    ]


def _heatmaps(variants: Variants) -> list[list[Drawn]]:
    """For each task the original, then every other variant and what it lost, in rows."""
    names = compared(variants)
    rows: list[list[Drawn]] = []
    for number, task in enumerate(variants[names[0]]["heatmaps"]):
        grids = {name: variants[name]["heatmaps"][task] for name in names}
        base = {(c["length_tokens"], c["depth"]): c["accuracy"] for c in grids[names[0]]}
        each = sorted({cell["n"] for cell in grids[names[0]]})
        count = f"{each[0]} to {each[-1]}" if len(each) > 1 else f"{each[0]}"
        for place, name in enumerate(names):
            cells = {(c["length_tokens"], c["depth"]): c["accuracy"] for c in grids[name]}
            drawn = _drawn(
                f"heat-{number}-{place}",
                f"{task}: {name}",
                f"Share of right answers by prompt length and depth of the evidence; {count} "
                "items in each cell.",
                _heat(cells, signed=False),
            )
            if place != 1:
                rows.append([])
            rows[-1].append(drawn)
            if place > 0:
                change = {key: value - base[key] for key, value in cells.items()}
                difference = _drawn(
                    f"heat-{number}-{place}-difference",
                    f"{task}: {name} less original",
                    "Red is lost, green is won.",
                    _heat(change, signed=True),
                )
                rows[-1].append(difference)
    return rows


def _heat(cells: Mapping[tuple[int, float], float], *, signed: bool) -> Figure:
    from matplotlib.patches import Rectangle

    lengths = sorted({length for length, _ in cells})
    depths = sorted({depth for _, depth in cells})
    figure, axes = new_figure(1.0 + 0.34 * len(depths), MARKS)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
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
    axes.set_xlim(-0.5, len(lengths) - 0.5)
    axes.set_ylim(len(depths) - 0.5, -0.5)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("depth")
    return figure


def _tasks(variants: Variants) -> list[Drawn]:
    """Accuracy by task, and the paired difference to the original."""
    names = compared(variants)
    tasks = list(variants[names[0]]["tasks"])
    if not tasks:
        return []
    found = [
        _drawn(
            "tasks",
            "Accuracy by task",
            "Mean share of references found in the answer, with 95% intervals.",
            _dots(
                variants, names, tasks, lambda f: (f["accuracy"], f["low"], f["high"]), (0.0, 1.0)
            ),
        )
    ]
    others = [name for name in names if name != ORIGINAL]
    if others:
        found.append(
            _drawn(
                "differences",
                "Change of accuracy against the original",
                "Paired over the same items, with 95% intervals; an interval that holds zero shows "
                "no clear change.",
                _dots(variants, others, tasks, _difference, None),
            )
        )
    return found


def _difference(found: Mapping[str, Any]) -> tuple[float, float, float]:
    change = found["difference"]
    return change["mean"], change["low"], change["high"]


def _dots(
    variants: Variants,
    names: Sequence[str],
    tasks: Sequence[str],
    value: Callable[[Mapping[str, Any]], tuple[float, float, float]],
    limits: tuple[float, float] | None,
) -> Figure:
    """One row for each task, one dot with its interval for each variant."""
    # The difference has no dot for the original, and everybody keeps their colour.
    colours = _colours(compared(variants))
    row_inches = 0.16 * len(names) + 0.14
    figure, axes = new_figure(0.9 + row_inches * len(tasks) + 0.2 * ((len(names) + 1) // 2), MARKS)
    step = 0.8 / len(names)
    for place, name in enumerate(names):
        shift = (place - (len(names) - 1) / 2) * step
        for row, task in enumerate(tasks):
            found = value(variants[name]["tasks"][task])
            draw_dot(axes, row + shift, found, colours[name], name if row == 0 else None)
    if limits is None:
        axes.axvline(0, color=MARKS.muted, linewidth=1)
    else:
        axes.set_xlim(limits[0] - 0.03, limits[1] + 0.03)
    axes.set_yticks(range(len(tasks)), tasks, color=MARKS.ink)
    axes.set_ylim(len(tasks) - 0.45, -0.55)
    axes.grid(axis="y", visible=False)
    legend_above(axes, MARKS)
    return figure


def _distance(variants: Variants) -> list[Drawn]:
    names = [name for name in compared(variants) if variants[name]["by_distance"]]
    if not names:
        return []
    figure, axes = new_figure(2.7, MARKS)
    rows = variants[names[0]]["by_distance"]
    colours = _colours(compared(variants))
    for place, name in enumerate(names):
        shift = (place - (len(names) - 1) / 2) * 0.1
        places = [i + shift for i in range(len(rows))]
        means = [row["nll"]["mean"] for row in variants[name]["by_distance"]]
        axes.plot(
            places,
            means,
            marker="o",
            markersize=4.5,
            color=colours[name],
            linewidth=1.4,
            label=name,
        )
        for x, row in zip(places, variants[name]["by_distance"], strict=True):
            reach = _STANDARD_ERRORS * (row["nll"]["stderr"] or 0.0)
            mean = row["nll"]["mean"]
            # A loss is never below zero.
            low = max(0.0, mean - reach)
            axes.plot([x, x], [low, mean + reach], color=colours[name], linewidth=1.2)
    labels = [f"{row['above_tokens'] + 1}–{row['up_to_tokens']}" for row in rows]
    axes.set_xticks(range(len(rows)), labels)
    axes.set_xlabel("tokens between the evidence and the answer")
    axes.set_ylabel("loss (nats per token)")
    legend_above(axes, MARKS)
    counts = ", ".join(f"{row['n']}" for row in rows)
    return [
        _drawn(
            "distance",
            "Loss by distance from the evidence",
            f"On the answers' tokens; bars reach two standard errors to each side. {counts} items.",
            figure,
        )
    ]


def _budget(summary: Mapping[str, Any]) -> list[Drawn]:
    """Quality against the share of the KV cache that is left, one colour for each selector."""
    variants: Variants = summary["variants"]
    if len(variants) < 3 or not summary["tasks"]:
        return []
    full = variants[next(iter(variants))]["cost"][-1]
    figure, axes = new_figure(2.9, MARKS)
    methods = list(dict.fromkeys(v["method"] for v in variants.values()))
    # The original first and chance last, so that colours mean the same as elsewhere.
    methods.sort(key=lambda method: method == PERIODIC.name)
    colours = dict(zip(methods, (*MARKS.series, *MARKS.series), strict=False))
    for method in methods:
        mine = [v for v in variants.values() if v["method"] == method]
        points = [(v["cost"][-1]["kv_bytes"] / full["kv_bytes"], v["overall"]) for v in mine]
        points.sort(key=lambda point: point[0])
        chance = method == PERIODIC.name
        for x, overall in points:
            if not chance:
                axes.plot(
                    [x, x], [overall["low"], overall["high"]], color=colours[method], linewidth=1.4
                )
        axes.plot(
            [x for x, _ in points],
            [overall["accuracy"] for _, overall in points],
            marker="x" if chance else "o",
            markersize=5,
            linestyle="none" if chance or len(points) == 1 else "-",
            linewidth=1.4,
            color=colours[method],
            label="every layer" if method == "all" else method,
        )
    axes.set_ylim(-0.04, 1.06)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    axes.set_xlabel(f"KV cache at {full['context_tokens']:,} tokens, of the original")
    axes.set_ylabel("accuracy, all tasks")
    legend_above(axes, MARKS)
    return [
        _drawn(
            "budget",
            "Quality against budget",
            "Accuracy over all items with 95% intervals, by how the full-attention layers were "
            "chosen; crosses are evenly spaced layers, one for each offset.",
            figure,
        )
    ]


def _by_count(variants: Variants) -> dict[str, str]:
    """One variant for each number of full-attention layers, as cost depends on nothing else."""
    chosen: dict[int, str] = {}
    for name, variant in variants.items():
        chosen.setdefault(len(variant["full_attention_layers"]), name)
    total = max(chosen)
    counts = sorted(chosen, reverse=True)[:_MOST_LINES]
    return {chosen[count]: f"{count} of {total} layers full" for count in counts}


def _cost(variants: Variants) -> list[Drawn]:
    names = _by_count(variants)
    colours = dict(zip(names, MARKS.series, strict=False))
    found = []
    for key, title, unit, caption in (
        (
            "kv_bytes",
            "KV cache by context",
            lambda value, _: human_bytes(int(value)),
            "Bytes of keys and values of one sequence, by formula.",
        ),
        (
            "prefill_flop",
            "Prefill work by context",
            lambda value, _: _engineering(value),
            "Floating-point operations of one prompt's matrix products, by formula.",
        ),
    ):
        figure, axes = new_figure(2.6, MARKS)
        for name, label in names.items():
            costs = variants[name]["cost"]
            axes.plot(
                [cost["context_tokens"] for cost in costs],
                [cost[key] for cost in costs],
                marker="o",
                markersize=3.5,
                linewidth=1.6,
                color=colours[name],
                label=label,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.minorticks_off()
        axes.xaxis.set_major_formatter(lambda value, _: f"{int(value):,}")
        axes.yaxis.set_major_formatter(unit)
        axes.set_xlabel("context (tokens)")
        legend_above(axes, MARKS)
        found.append(_drawn(key.replace("_", "-"), title, caption, figure))
    return found


def _engineering(value: float) -> str:
    for size, name in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")):
        if value >= size:
            return f"{value / size:g} {name}"
    return f"{value:g} FLOP"


def _selectors(rows: Sequence[Mapping[str, Any]]) -> list[Drawn]:
    if not rows:
        return []
    figure, axes = new_figure(0.8 + 0.27 * len(rows), MARKS)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    colours = dict(zip(methods, (*MARKS.series[1:], *MARKS.series), strict=False))
    for place, row in enumerate(rows):
        value = row["accuracy"], row["low"], row["high"]
        draw_dot(axes, place, value, colours[row["method"]])
    axes.set_yticks(range(len(rows)), [row["variant"] for row in rows], color=MARKS.ink)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(-0.03, 1.03)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("accuracy, all tasks")
    return [
        _drawn(
            "selectors",
            "Ways of choosing as many layers",
            "Accuracy over all items with 95% intervals, plans of the same number of full layers "
            "together.",
            figure,
        )
    ]
