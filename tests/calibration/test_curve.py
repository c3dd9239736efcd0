"""Quality against budget: the front, the numbers, the table and the picture."""

from __future__ import annotations

import json
import math
import re
import statistics
from dataclasses import asdict
from itertools import groupby, product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.calibration.curve import Curve, build_curve, load_curve
from converter.calibration.figures import pareto_figure
from converter.calibration.results import Outcome
from converter.cli.console import Console
from converter.cli.tables import show_curve
from converter.common.drawing import DARK, LIGHT, MARKS, Palette, drawing, to_png, to_svg
from converter.common.errors import ScoresError
from converter.model.dimensions import ModelDimensions
from converter.model.mask import Mask
from tests.calibration.test_results import outcome

# A token takes 128 bytes in each of four layers.
SHAPE = ModelDimensions(4, 64, 4, 2, 16, 96, 320, 512, 2)
MASK = Mask(100)


ORIGINAL = outcome("original", (0, 1, 2, 3), 0.1, 0.2, 0.3)
PLANS = (
    outcome("all sliding", (), 4.1, 5.2, 6.3),
    outcome("greedy", (2,), 0.5, 0.8, 1.1),
    outcome("nll-restore", (1,), 2.0, 2.5, 3.0),
    outcome("periodic, offset 0", (0,), 3.0, 3.5, 2.5),
    outcome("periodic, offset 1", (1,), 2.0, 2.5, 3.0),
    outcome("periodic, offset 2", (2,), 0.5, 0.8, 1.1),
    outcome("greedy", (1, 2), 0.2, 0.3, 0.5),
    outcome("nll-restore", (2, 1), 0.2, 0.3, 0.5),
    outcome("periodic, offset 0", (0, 2), 0.15, 0.25, 0.38),
    outcome("periodic, offset 1", (1, 3), 2.0, 1.5, 2.5),
    outcome("greedy", (1, 2, 3), 0.11, 0.2, 0.32),
    outcome("nll-restore", (0, 1, 2), 0.2, 0.3, 0.4),
)


@pytest.fixture(scope="module")
def curve() -> Curve:
    return build_curve(ORIGINAL, PLANS, SHAPE, MASK, 512)


def test_the_front_is_the_one_seen_by_eye(curve: Curve) -> None:
    assert {(point.name, point.full) for point in curve.points if point.on_front} == {
        ("all sliding", ()),
        ("greedy", (2,)),
        # The same plan by another name is as good.
        ("periodic, offset 2", (2,)),
        ("periodic, offset 0", (0, 2)),
        ("greedy", (1, 2, 3)),
        ("original", (0, 1, 2, 3)),
    }


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.lists(st.integers(-3, 3), min_size=2, max_size=2)),
        max_size=12,
    ),
    st.booleans(),
)
def test_the_front_is_that_of_a_sweep(plans: list[tuple[int, list[int]]], decode: bool) -> None:
    """From few full layers to many, only the best of each number that beats all before it stay."""
    original = outcome("original", (0, 1, 2, 3), 0.0, 0.0)
    given_plans = [
        outcome(str(number), tuple(range(count)), *map(float, nll))
        for number, (count, nll) in enumerate(plans)
    ]
    everything = [(count, sum(nll), str(number)) for number, (count, nll) in enumerate(plans)]
    least, kept = math.inf, set[str]()
    for (_, total), same in groupby(sorted([*everything, (4, 0, "original")]), lambda p: p[:2]):
        if total < least:
            kept |= {name for _, _, name in same}
            least = total
    found = build_curve(original, given_plans, SHAPE, Mask(100, 0, decode), 512)
    assert {point.name for point in found.points if point.on_front} == kept


def test_costs_and_losses_are_those_counted_by_hand(curve: Curve) -> None:
    points = {(point.name, point.count): point for point in curve.points}
    greedy = points["greedy", 1]
    assert greedy.kv_bytes == 128 * (512 + 3 * 100)
    assert greedy.kv_share == greedy.kv_bytes / (128 * 4 * 512)
    paired = [0.5 - 0.1, 0.8 - 0.2, 1.1 - 0.3]
    assert greedy.loss.mean == pytest.approx(statistics.mean(paired))
    assert greedy.loss.stderr == pytest.approx(statistics.stdev(paired) / 3**0.5)
    assert (greedy.right.accuracy, greedy.right.n) == (2 / 3, 3)
    assert points["nll-restore", 2].full == (1, 2)
    assert (curve.original.name, curve.original.kv_share) == ("original", 1.0)
    assert (curve.original.loss.mean, curve.original.loss.stderr) == (0.0, 0.0)


def test_points_come_by_number_of_full_layers_and_choices_as_given(curve: Curve) -> None:
    counts = [point.count for point in curve.points]
    assert counts == sorted(counts) and len(counts) == len(PLANS) + 1
    chosen = [(name, len(points)) for name, points in curve.choices().items()]
    assert chosen == [("greedy", 3), ("nll-restore", 3)]
    assert [end.name for end in curve.ends] == ["all sliding", "original"]
    even = {n: [point.name[-1] for point in group] for n, group in curve.periodic().items()}
    assert even == {1: ["2", "1", "0"], 2: ["0", "1"]}


def test_the_original_comes_once_and_other_examples_are_refused(curve: Curve) -> None:
    whole = outcome("greedy", (0, 1, 2, 3), *ORIGINAL.nll)
    assert build_curve(ORIGINAL, (*PLANS, whole), SHAPE, MASK, 512) == curve
    with pytest.raises(ValueError, match="another number of examples"):
        build_curve(ORIGINAL, [outcome("greedy", (1,), 1.0)], SHAPE, MASK, 512)


def test_the_saved_curve_holds_every_number(curve: Curve) -> None:
    saved = json.loads(json.dumps(curve.to_json(), allow_nan=False))
    assert (saved["layers"], saved["context_tokens"], saved["examples"]) == (4, 512, 3)
    for point, value in zip(curve.points, saved["points"], strict=True):
        assert value.pop("full_layers") == len(value["full_attention_layers"])
        said = asdict(point) | {"full_attention_layers": list(point.full)}
        del said["is_periodic"], said["full"], said["kv_heads"]
        said |= {"nll_above_original": said.pop("loss"), "answers_right": said.pop("right")}
        assert value == said
    assert [
        (p["full_layers"], p["offsets"], p["best"]["name"][-1], p["worst"]["name"][-1])
        for p in saved["periodic"]
    ] == [(1, 3, "2", "0"), (2, 2, "0", "1")]


def test_the_table_has_every_choice_beside_the_range(
    curve: Curve, capsys: pytest.CaptureFixture[str]
) -> None:
    show_curve(Console(json_output=False, verbosity=0), curve)
    printed = capsys.readouterr().out
    assert "on 3 examples" in printed and "at 512 tokens" in printed
    rows = [line.split() for line in printed.splitlines() if line.strip()[:1].isdigit()]
    assert [" ".join(row[:2]) for row in rows] == [
        *("0 all", "1 greedy", "1 nll-restore", "2 greedy", "2 nll-restore"),
        *("3 greedy", "3 nll-restore", "4 original"),
    ]
    one, two = " ".join(rows[1]), " ".join(rows[3])
    assert one.startswith("1 greedy 101.5 KiB 40% 0.600 ± 0.115 0.667 [")
    assert one.endswith("] ● 0.600 ± 0.115 ● 2.800 ± 0.321")
    # Here an evenly spaced plan is on the front, and the chosen one is not.
    assert two.endswith("] 0.060 ± 0.010 ● 1.800 ± 0.265")


def test_a_number_that_was_only_spaced_evenly_has_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    plans = [plan for plan in PLANS if plan.name.startswith("periodic")]
    even = build_curve(ORIGINAL, plans, SHAPE, MASK, 512)
    show_curve(Console(json_output=False, verbosity=0), even)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "±" in line]
    named = [" ".join(row[:4]) for row in rows[1:]]
    assert named == ["1 periodic, offset 2", "2 periodic, offset 0"]


TEXTS = (
    *("greedy", "nll-restore", "evenly spaced, every offset", "filled: on the front"),
    *("loss above the original", "answers right", "KV cache, of 256.0 KiB at 512 tokens"),
)


def texts_of(figure: Any) -> str:
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text))


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_the_picture_is_drawn_with_its_texts(curve: Curve, palette: Palette) -> None:
    with drawing():
        figure = pareto_figure(curve, palette)
        image = to_png(figure, palette)
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    assert all(text in texts_of(figure) for text in TEXTS)


def test_the_picture_follows_the_theme_of_a_page(curve: Curve) -> None:
    with drawing():
        text = to_svg(pareto_figure(curve, MARKS), "pareto", "quality against budget")
    assert "greedy" in text and "var(--two)" in text and "#fe00" not in text


def marks(axes: Any) -> dict[tuple[float, float], bool]:
    """Where single points are drawn, and whether they are filled."""
    singles = [line for line in axes.lines if len(line.get_xdata()) == 1]
    places = [tuple(line.get_xydata()[0].round(6).tolist()) for line in singles]
    filled = [line.get_markerfacecolor() == line.get_color() for line in singles]
    return dict(zip(places, filled, strict=True))


def test_points_lie_where_their_numbers_say(curve: Curve) -> None:
    figure = pareto_figure(curve, LIGHT)
    upper, lower = figure.axes
    drawn = [point for point in curve.points if not point.is_periodic or point.on_front]
    losses = [(round(p.kv_share, 6), round(p.loss.mean, 6)) for p in drawn]
    assert marks(upper) == dict(zip(losses, [p.on_front for p in drawn], strict=True))
    right = {(round(p.kv_share, 6), round(p.right.accuracy, 6)) for p in drawn}
    assert marks(lower).keys() == right
    greedy = next(point for point in curve.points if point.name == "greedy")
    intervals = [
        tuple(map(float, line.get_ydata()))
        for line in upper.lines
        if list(line.get_xdata()) == [greedy.kv_share] * 2 and line.get_color() == LIGHT.two
    ]
    reach = statistics.NormalDist().inv_cdf(0.975) * (greedy.loss.stderr or 0)
    assert intervals == [pytest.approx((greedy.loss.mean - reach, greedy.loss.mean + reach))]


def test_the_band_spans_the_offsets(curve: Curve) -> None:
    upper, lower = pareto_figure(curve, LIGHT).axes
    for axes, spans in ((upper, [(0.6, 2.8), (0.06, 1.8)]), (lower, [(0, 2 / 3), (0, 1)])):
        corners = axes.collections[0].get_paths()[0].vertices
        across = corners[:, 0].round(9)
        heights = [corners[across == x, 1] for x in sorted(set(across))]
        found = [(there.min(), there.max()) for there in heights]
        assert found == [pytest.approx(span) for span in spans]


def many(names: int, loss: float = 5.0, mask: Mask = MASK) -> Curve:
    """A curve of so many ways of choosing."""
    plans = [outcome("all sliding", (), loss, loss)]
    for count, number in product((1, 2, 3), range(names)):
        value = loss / (count + number + 1)
        plans.append(outcome(f"method-number-{number}", tuple(range(count)), value, value / 2))
    return build_curve(outcome("original", (0, 1, 2, 3), 0.0, 0.0), plans, SHAPE, mask, 512)


@pytest.mark.parametrize("names", [0, 1, 5, 11])
@pytest.mark.parametrize("loss", [0.01, 5.0, 40.0])
def test_nothing_overlaps_or_leaves_the_picture(names: int, loss: float) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with drawing():
        figure = pareto_figure(many(names, loss), LIGHT)
        FigureCanvasAgg(figure).draw()
    upper, lower = figure.axes
    (key,) = figure.legends
    paper = figure.bbox
    for part in (key, upper, lower):
        box = part.get_tightbbox()
        assert paper.x0 <= box.x0 and box.x1 <= paper.x1
        assert paper.y0 <= box.y0 and box.y1 <= paper.y1
    assert key.get_tightbbox().y0 >= upper.get_tightbbox().y1
    assert upper.get_tightbbox().y0 >= lower.get_tightbbox().y1
    for axes, axis in ((upper, upper.yaxis), (lower, lower.yaxis), (lower, lower.xaxis)):
        labels = [
            label.get_window_extent()
            for place, label in zip(axis.get_majorticklocs(), axis.get_ticklabels(), strict=True)
            if label.get_text()
            and min(axis.get_view_interval()) <= place <= max(axis.get_view_interval())
        ]
        assert len(labels) >= 3, axes
        assert not any(a.overlaps(b) for i, a in enumerate(labels) for b in labels[:i])
    looks = {
        (line.get_color(), line.get_linestyle())
        for line in upper.lines
        if line.get_label().startswith("method")
    }
    assert len(looks) == names


def test_where_no_cache_is_freed_full_layers_take_its_place() -> None:
    figure = pareto_figure(many(1, mask=Mask(100, 0, True)), LIGHT)
    assert {x for x, _ in marks(figure.axes[0])} == {0.0, 0.25, 0.5, 0.75, 1.0}
    assert "full layers, of 4 (the KV cache stays whole)" in texts_of(figure)


# --- what is recommended ----------------------------------------------------------------------


def measured(losses: dict[int, tuple[float, float]], right: bool = True) -> Curve:
    """A curve of four layers on 16 examples: by full layers, the mean loss and its swing."""
    examples = range(16)
    plans = [
        Outcome(
            "all sliding" if count == 0 else "original" if count == 4 else "search",
            tuple(range(count)),
            tuple(mean + swing * (-1) ** i for i in examples),
            (right,) * 16,
        )
        for count, (mean, swing) in losses.items()
    ]
    return build_curve(plans[-1], plans[:-1], SHAPE, MASK, 512)


STEEP = {0: (4.0, 0.4), 1: (0.4, 0.4), 2: (0.02, 0.01), 3: (0.01, 0.01), 4: (0.0, 0.0)}


@pytest.mark.parametrize(
    ("changes", "count", "said"),
    [
        ({}, 2, "2 of 4 lose 0.020 ± 0.003 .* clearly below 0.05; 1 lose 0.400 ± 0.103.$"),
        ({2: (0.04, 0.1)}, 2, "which 16 examples do not tell from 0.05; 1 lose 0.400 ± 0.103.$"),
        ({1: (0.06, 0.4)}, 2, "1 lose 0.060 ± 0.103, which may be no more.$"),
        ({1: (0.05, 0.0)}, 1, "Recommended: 1 full layers. .*; 0 lose 4.000"),
        ({0: (0.01, 0.0)}, None, "With every layer sliding these examples lose 0.010 ± 0.000"),
        ({2: (0.1, 0.0), 3: (0.1, 0.0)}, None, "No number of full layers below all 4 loses less"),
    ],
    ids=["clear", "unsure", "fewer may do", "the bound itself", "none needed", "none enough"],
)
def test_the_fewest_layers_that_lose_little_are_recommended(
    changes: dict[int, tuple[float, float]], count: int | None, said: str
) -> None:
    """By means; how surely, by intervals."""
    advice = measured(STEEP | changes).advice
    assert (None if advice.point is None else advice.point.count) == count
    assert re.search(said, advice.reason)


def test_nothing_is_recommended_on_few_examples_or_on_a_task_that_the_model_cannot_do(
    curve: Curve,
) -> None:
    assert curve.advice.point is None
    assert curve.advice.reason.startswith("On 3 examples no number of full layers is recommended")
    assert measured(STEEP, right=False).advice.point is None


def test_a_saved_curve_is_read_back(tmp_path: Path) -> None:
    saved, path = measured(STEEP), tmp_path / "curve.json"
    path.write_text(json.dumps(saved.to_json()))
    assert load_curve(path) == saved


@pytest.mark.parametrize(
    "change", [{"points": []}, {"layers": 3}, {"points": [{}]}, {"examples": "x"}]
)
def test_what_is_no_curve_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "curve.json"
    path.write_text(json.dumps(measured(STEEP).to_json() | change))
    with pytest.raises(ScoresError, match="not a saved curve"):
        load_curve(path)
