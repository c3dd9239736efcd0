"""Choosing KV heads: scores, budgets and comparisons of heads, held against layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from statistics import fmean

import pytest
from matplotlib.colors import to_hex

from converter.calibration.calibrate import CalibrationTask, calibrate
from converter.calibration.data.examples import Examples
from converter.calibration.evaluator import open_evaluator
from converter.calibration.figures import head_map
from converter.calibration.results import ComparedPlan, MethodComparison, Outcome
from converter.calibration.run import CalibrationRun
from converter.calibration.scores import ExampleScores, Scores
from converter.calibration.scores_file import load_scores
from converter.calibration.selectors import BEST, NORMAL, selectors_of
from converter.calibration.selectors.guided import GUIDED, joint_swaps
from converter.calibration.selectors.one_layer import NLL_RESTORE, PATH_INTEGRAL
from converter.common.drawing import LIGHT
from converter.common.errors import PlanError, ScoresError
from converter.common.files import write_json
from converter.inference.positions import LayerTypes, token_spans
from converter.model.dimensions import ModelDimensions
from converter.model.mask import FULL, SLIDING, Mask, kind_of_heads
from converter.plan.budget import parse_budget
from converter.plan.plan import Plan, cache_bytes, kv_bytes
from converter.plan.units import KV_HEAD, LAYER, Units, units_of
from tests.brute_force import EagerModel
from tests.conftest import LAYERS
from tests.inference.conftest import whole_logits
from tests.kv_heads import KV_HEADS, grouped_model
from tests.runners import EXAMPLES, MASKS, example_of, loss, run, silent

MASK = MASKS["plain"]
UNITS = Units(LAYERS, KV_HEADS)
FRESH = tuple(example_of(50 + i, 2, seed=8) for i in range(4))

pytestmark = pytest.mark.usefixtures("exactly")


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return grouped_model(tmp_path_factory.mktemp("grouped") / "model")


@pytest.fixture
def by_heads(grouped: Path, tmp_path: Path) -> CalibrationRun:
    return run(grouped, EXAMPLES, MASK, tmp_path / "work", granularity=KV_HEAD)


@pytest.fixture(scope="module")
def mean_loss(grouped: Path, exactly: None) -> Callable[[LayerTypes], float]:  # noqa: ARG001
    """Nothing of ours: a whole eager pass an example, under a mask for each head."""
    model = EagerModel(grouped)

    def of(kinds: LayerTypes) -> float:
        return fmean(
            loss(whole_logits(model, one, kinds, MASK)[len(one.prompt) - 1 :], one)
            for one in EXAMPLES
        )

    return of


# --- units --------------------------------------------------------------------------------------


def test_units_are_heads_layer_by_layer() -> None:
    kinds = UNITS.types({1, 4, 5, 6, 7, 15})
    assert kinds == ("mixed_attention:1", FULL, SLIDING, "mixed_attention:3")
    assert Plan(kinds, MASK, "", None, None, "", None).units_in_full(UNITS) == (1, 4, 5, 6, 7, 15)
    assert UNITS.told((1, 4, 5, 6, 7, 13, 15)) == "0:1 1 3:1,3"
    assert Units(4).told((2, 0)) == "2, 0"
    assert UNITS.are_whole_layers(UNITS.of_layers((3, 1)))
    assert not UNITS.are_whole_layers({0, 1, 2})


def test_a_plan_of_heads_is_a_map_and_no_profile_of_layers() -> None:
    mixed = Plan(
        ("mixed_attention:1", FULL, "linear_attention", SLIDING), MASK, "", None, None, "", None
    )
    assert mixed.strip == "▒█-·"
    assert mixed.head_strips(2) == ["·█-·", "██-·"]
    whole = replace(mixed, layer_types=(SLIDING, FULL, "linear_attention", SLIDING))
    assert mixed.offering({"other": whole}).profiles == {"other": (1,)}
    with pytest.raises(PlanError, match="a profile is a plan of whole layers"):
        whole.offering({"heads": mixed})


def test_the_picture_is_a_map_of_layers_by_heads() -> None:
    example = ExampleScores("pair", 100, 4, None, None, tuple(float(i) for i in range(16)))
    scores = Scores("guided", MASK, (example,), 1.0, {}, tuple(range(16))[::-1], kv_heads=KV_HEADS)
    kinds = UNITS.types({1, 4, 5, 6, 7})
    axes = head_map(scores, kinds, LIGHT).axes[0]
    cells = [patch for patch in axes.patches if patch.get_width() == pytest.approx(0.92)]
    full = [
        (round(cell.get_x() + 0.46), round(cell.get_y() + 0.43))
        for cell in cells
        if to_hex(cell.get_facecolor()) == to_hex(LIGHT.full)
    ]
    assert len(cells) == 16
    assert full == [(0, 1), (1, 0), (1, 1), (1, 2), (1, 3)]
    assert [text.get_text() for text in axes.texts] == [f"{float(i):.2f}" for i in range(16)]


def test_a_model_of_one_kv_head_has_no_heads_to_tell_apart() -> None:
    one = ModelDimensions(4, 64, 4, 1, 16, 96, 320, 4096, 2)
    assert units_of(LAYER, one) == Units(4)
    with pytest.raises(PlanError, match="plans of KV heads are plans of layers"):
        units_of(KV_HEAD, one)


# --- budgets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["1/8", "1/4", "1/2", "5", "kv:600KiB", "kv:200KiB@2k"])
@pytest.mark.parametrize("decode", [False, True])
def test_a_budget_of_heads_is_the_same_memory_as_one_of_layers(text: str, decode: bool) -> None:
    shape, mask = ModelDimensions(8, 64, 8, 4, 16, 96, 320, 4096, 2), Mask(64, 4, decode)
    budget, units = parse_budget(text), units_of(KV_HEAD, shape)
    if decode and text.startswith("kv"):
        return
    count = budget.count(units, shape, mask)
    layers = budget.count(Units(8), shape, mask)
    tokens = budget.tokens(shape)
    plan = Plan(units.types(range(count)), mask, "", text, None, "", None)
    size = kv_bytes(plan, shape, tokens)["hybrid"]
    # By the definition: every head of every layer holds the context, or the window and the sinks.
    near = tokens if decode else 68
    assert size == 2 * 16 * 2 * sum(tokens if i < count else near for i in range(units.total))
    if "/" in text:
        assert count == units.total * Fraction(text)
        assert size == cache_bytes(layers, mask, shape, tokens)
    elif text.startswith("kv"):
        least = cache_bytes(Fraction(count + 1, 4), mask, shape, tokens)
        assert size <= budget.limit_bytes < least  # type: ignore[attr-defined]
        assert count // 4 == layers


# --- scores -------------------------------------------------------------------------------------


def test_restoring_a_head_is_worth_what_whole_passes_say(
    by_heads: CalibrationRun, mean_loss: Callable[[LayerTypes], float]
) -> None:
    task = CalibrationTask((replace(NLL_RESTORE, granularity=KV_HEAD),), 4)
    scores = calibrate(by_heads, task, silent).scores
    assert (scores.method, scores.units) == ("nll-restore of KV heads", UNITS)
    sliding = mean_loss((SLIDING,) * LAYERS)
    for unit, estimate in enumerate(scores.estimates):
        restored = mean_loss(UNITS.types({unit}))
        assert estimate.mean == pytest.approx(sliding - restored, abs=1e-10)
    assert scores.order == tuple(sorted(range(16), key=lambda u: (-scores.estimates[u].mean, u)))


def test_the_heads_path_integral_sums_to_that_of_layers(grouped: Path, tmp_path: Path) -> None:
    found = {}
    for granularity in (LAYER, KV_HEAD):
        measured = run(grouped, EXAMPLES, MASK, tmp_path / granularity, granularity=granularity)
        task = CalibrationTask((replace(PATH_INTEGRAL, granularity=granularity),), 1)
        found[granularity] = calibrate(measured, task, silent).scores
    rows = UNITS.rows([score.mean for score in found[KV_HEAD].estimates])
    by_layer = [score.mean for score in found[LAYER].estimates]
    assert [sum(row) for row in rows] == pytest.approx(by_layer, abs=1e-12)
    # One gradient tells all of them.
    assert found[KV_HEAD].layer_forwards == found[LAYER].layer_forwards


def test_guided_search_finds_nearly_the_best_heads_of_all(by_heads: CalibrationRun) -> None:
    """Held against every set of two heads."""
    guided = replace(GUIDED, granularity=KV_HEAD, passes=60)
    with (
        open_evaluator(by_heads, EXAMPLES, "scores") as evaluator,
        evaluator.tallying("guided", 1.0, silent),
    ):
        kept = frozenset(guided.choose(evaluator, 2).order[:2])
        every = [frozenset(two) for two in combinations(range(16), 2)]
        found, *losses = evaluator.losses([kept, *every])
    assert found <= sorted(losses)[3]


def test_choosing_heads_takes_no_more_passes_than_choosing_layers() -> None:
    mask = Mask(2048)
    spans = token_spans(example_of(16384, 8), mask)
    layers, heads = Units(36), Units(36, 8)
    for method in ("guided", "path-integral"):
        (of_layers,), (of_heads,) = (
            selectors_of(method, NORMAL, granularity) for granularity in (LAYER, KV_HEAD)
        )
        asked = of_heads.cost(spans, mask, heads, 72)
        assert asked == of_layers.cost(spans, mask, layers, 9)
        assert asked < 37 * 36
    # Restoring each by itself is what grows with them.
    assert NLL_RESTORE.cost(spans, mask, heads, 72) > 7 * NLL_RESTORE.cost(spans, mask, layers, 9)


def test_many_swaps_at_once_are_of_the_pairs_that_foretell_most() -> None:
    slopes = [0.4, -3.0, 0.2, -2.0, 0.1, -1.0, -0.5, 0.0]
    now = frozenset({0, 2, 4, 6})
    assert joint_swaps(now, slopes, frozenset(range(8))) == [{1, 3, 4, 6}]
    # Units that may not be swapped stay, and pairs that would not help are left out.
    assert joint_swaps(now, slopes, frozenset({0, 1, 2, 7})) == [{1, 7, 4, 6}]
    assert joint_swaps(now, slopes, frozenset({0, 1, 6, 7})) == []


# --- the comparison with layers -----------------------------------------------------------------


def compared(heads: tuple[float, ...], layers: tuple[float, ...]) -> MethodComparison:
    def entry(name: str, full: tuple[int, ...], nll: tuple[float, ...]) -> ComparedPlan:
        right = (True,) * len(nll)
        offset = 0 if name == "periodic" else None
        return ComparedPlan(Outcome(name, full, nll, right, offset, 2), fmean(nll), 1.0)

    worst = tuple(x + 9.0 for x in layers)
    entries = (
        entry("guided", (2, 3), layers),
        entry("guided of KV heads", (0, 3), heads),
        entry("periodic", (0, 1), worst),
    )
    return MethodComparison(2, entries, entry("original", tuple(range(8)), heads).outcome)


def test_heads_are_taken_where_they_are_better_beyond_doubt_and_layers_elsewhere() -> None:
    same = tuple(1.0 + 0.01 * i for i in range(16))
    better = tuple(x - 0.3 - 0.01 * (i % 2) for i, x in enumerate(same))
    doubtful = tuple(x - 0.3 * (-1) ** i - 0.01 for i, x in enumerate(same))
    clear = compared(better, same)
    assert clear.winner == "guided of KV heads"
    assert "KV heads are worth telling apart" in clear.conclusion()
    for heads in (doubtful, same):
        close = compared(heads, same)
        assert close.winner == "guided"
        assert "KV heads are not clearly better, and run in fewer engines" in close.conclusion()
    saved = json.loads(json.dumps(clear.to_json()))
    assert saved["entries"][1]["full_kv_heads"] == [0, 3]
    assert MethodComparison.from_json(saved, range(8), 2) == clear


def test_a_plan_of_layers_that_wins_is_one_to_every_engine(grouped: Path, tmp_path: Path) -> None:
    """The best of both granularities at the same memory; the scores keep what was measured."""
    measured = run(grouped, EXAMPLES, MASK, tmp_path / "work", granularity=KV_HEAD)
    measured = replace(measured, examples=Examples(EXAMPLES, FRESH, ()))
    task = CalibrationTask(selectors_of(BEST, "low", KV_HEAD), 4)
    scores = calibrate(measured, task, silent).scores
    comparison = scores.comparison
    assert comparison is not None
    names = {one.outcome.name for one in comparison.entries}
    assert {"guided", "guided of KV heads", "periodic, offset 0"} <= names
    for one in comparison.entries:
        assert len(one.outcome.full) == 4
        assert one.outcome.is_mixed == (one.outcome.name == "guided of KV heads") or not (
            one.outcome.is_mixed
        )
    winner = comparison.entry(comparison.winner).outcome
    assert set(scores.front(4)) == set(winner.full)
    assert scores.chosen_by(4) == comparison.winner


# --- files -----------------------------------------------------------------


def test_scores_of_heads_are_read_back_and_checked(
    by_heads: CalibrationRun, tmp_path: Path
) -> None:
    task = CalibrationTask((replace(NLL_RESTORE, granularity=KV_HEAD),), 4)
    scores = calibrate(by_heads, task, silent).scores
    path, value = tmp_path / "scores.json", scores.to_json()
    write_json(path, value)
    assert load_scores(path) == scores
    assert value["kv_heads"] == KV_HEADS
    assert [(one["index"], one["kv_head"]) for one in value["layers"][3:6]] == [
        (0, 3),
        (1, 0),
        (1, 1),
    ]
    scores.check_model(by_heads.source)
    with pytest.raises(ScoresError, match="another granularity"):
        scores.check_granularity(LAYER)
    for kv_heads in (0, 3, "4", 2):
        write_json(path, value | {"kv_heads": kv_heads})
        if kv_heads == 2:
            # Eight layers of two heads have as many.
            with pytest.raises(ScoresError, match="another depth"):
                load_scores(path).check_model(by_heads.source)
        else:
            with pytest.raises(ScoresError, match="damaged"):
                load_scores(path)


def test_every_kind_of_a_layer_is_told_from_its_heads() -> None:
    for count in range(KV_HEADS + 1):
        for kept in combinations(range(KV_HEADS), count):
            assert Units(1, KV_HEADS).types(kept) == (kind_of_heads(kept, KV_HEADS),)
