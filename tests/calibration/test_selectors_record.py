"""The record of the selector benchmark, on made-up results whose answers are worked out by hand.

Four layers, 100 test examples. The original's loss is 1 and all sliding's is 5 on every example,
so that a quarter of the gap is 1 nat and close is within 0.2.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
# Benchmarks are scripts: they find each other beside them.
sys.path.append(str(ROOT / "benchmarks"))

import selectors_docs  # noqa: E402
import selectors_findings  # noqa: E402
import selectors_ordering  # noqa: E402
import selectors_record  # noqa: E402
import selectors_results  # noqa: E402
import selectors_seeds  # noqa: E402

EXAMPLES = 100
ACCURACY, NLL = selectors_ordering.MEASURES
BEST_HALF, MEAN_HALF, BEST_QUARTER, MEAN_QUARTER, LAZY = selectors_ordering.CLAIMS


def plan(
    name: str, layers: list[int], nll: float, right: int, cost: float | None = None, wave: float = 0
) -> dict[str, Any]:
    """A plan of that loss, `wave` more on every even example and less on every odd one."""
    losses = [nll + (wave if index % 2 == 0 else -wave) for index in range(EXAMPLES)]
    return {
        "name": name,
        "layers": layers,
        "nll": nll,
        "nll_above": nll - 1,
        "nll_above_stderr": 0.01,
        "right": right,
        "layer_forwards": cost,
        "per_example": losses,
        "correct": [int(index < right) for index in range(EXAMPLES)],
    }


UNIFORM = [plan("original", [0, 1, 2, 3], 1, 95), plan("all sliding", [], 5, 5)]
# Naive restore-one is 1000.
QUARTER = [
    *UNIFORM,
    plan("nll-restore", [1], 2, 70, 200),
    plan("lazy", [3], 2, 74, 100, wave=1),
    plan("greedy", [0], 1.5, 80, 500),
    plan("best", [0], 1.5, 80, 1200),
    plan("periodic, offset 0", [0], 1.5, 80),
    plan("periodic, offset 1", [1], 2, 70),
    plan("periodic, offset 2", [2], 4, 10),
    plan("periodic, offset 3", [3], 2, 74, wave=1),
    plan("last", [3], 2, 74, wave=1),
    plan("random, seed 0", [2], 4, 10),
    plan("random, seed 1", [1], 2, 70),
]
EVERY_QUARTER = [
    plan(f"plan ({layer},)", [layer], nll, 0) | {"per_example": None, "correct": None}
    for layer, nll in enumerate([1.5, 2, 4, 2])
]
HALF = [
    *UNIFORM,
    plan("nll-restore", [1, 3], 1.9, 84, 200),
    # Better than `best` on the mean, but not clearly.
    plan("lazy", [2, 3], 1.35, 90, 100, wave=1),
    plan("greedy", [0, 1], 1.2, 90, 700),
    plan("best", [0, 3], 1.4, 90, 1400),
    plan("periodic, offset 0", [0, 2], 1.95, 70),
    plan("periodic, offset 1", [1, 3], 1.9, 84),
    plan("last", [2, 3], 1.35, 90, wave=1),
    plan("random, seed 0", [0, 1], 1.2, 90),
    plan("random, seed 1", [1, 2], 3.2, 30),
]


SETTINGS = {"samples": 50, "validation": 25, "test": EXAMPLES, "seeds": [0, 7]}
MODEL = {
    "layers": 4,
    "naive_layer_forwards": 1000,
    "budgets": {
        "1/4": {"keep": 1, "plans": QUARTER + EVERY_QUARTER},
        "1/2": {"keep": 2, "plans": HALF},
    },
    # On other calibration examples greedy chooses the same at 1/4, and worse at 1/2.
    "other_seeds": {
        "7": {
            "1/4": [{"name": "greedy", "layers": [0], "nll_above": 0.5, "right": 80}],
            "1/2": [{"name": "greedy", "layers": [1, 3], "nll_above": 0.9, "right": 84}],
        }
    },
}


def results_file(folder: Path, *more: dict[str, Any]) -> Path:
    data = {
        "settings": SETTINGS | {"window": 16, "prompt_tokens": 256},
        "versions": {"torch": "2"},
        "models": {"small": MODEL} | {f"worse {i}": model for i, model in enumerate(more)},
    }
    path = folder / "numbers.json"
    path.write_text(json.dumps(data))
    return path


def changed(budget: str, plans: list[dict[str, Any]]) -> dict[str, Any]:
    budgets: Any = MODEL["budgets"]
    return MODEL | {"budgets": budgets | {budget: budgets[budget] | {"plans": plans}}}


@pytest.fixture
def model(tmp_path: Path) -> selectors_results.Model:
    return selectors_results.load(results_file(tmp_path)).models[0]


def rows(text: str, start: str) -> list[list[str]]:
    """The cells of a record's table rows whose first cell begins so."""
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [row for row in cells if row[0].startswith(start)]


def test_results_know_ranks_distances_and_scores_by_way_of_choosing(tmp_path: Path) -> None:
    missing = changed("1/4", (QUARTER + EVERY_QUARTER)[:-1])
    model, incomplete = selectors_results.load(results_file(tmp_path, missing)).models
    assert incomplete.budgets["1/4"].every is None
    quarter = model.budgets["1/4"]
    every = quarter.every
    assert every is not None
    assert every.best == (0,)
    # Two plans share the second place.
    assert [every.rank((layer,)) for layer in range(4)] == [1, 2, 4, 2]
    assert [every.distance((layer,)) for layer in range(4)] == [0, 0.5, 2.5, 0.5]
    assert every.mean_distance == pytest.approx(3.5 / 4)
    assert model.budgets["1/2"].every is None
    scores = model.budgets["1/4"].scores()
    assert scores["random, mean of seeds"].above == pytest.approx(2)
    assert scores["random, mean of seeds"].lost == pytest.approx(0.95 - 0.4)
    assert scores["random, mean of seeds"].cost is None
    assert scores["periodic, best offset"].above == pytest.approx(0.5)
    assert scores["periodic, mean of offsets"].above == pytest.approx(5.5 / 4)
    assert scores["periodic, worst offset"].above == pytest.approx(3)
    assert scores["best"].cost == pytest.approx(1.2)
    assert scores["best"].closed == pytest.approx(1 - 0.5 / 4)
    assert "random, seed 0" not in scores


def test_verdicts(model: selectors_results.Model) -> None:
    def verdict(claim: selectors_ordering.Claim, name: str) -> tuple[float, str]:
        found = NLL.find(claim, model, name)
        return round(found.advantage.mean, 6), found.verdict

    # 0.1 worse than every second layer, of 0.2 allowed.
    assert verdict(BEST_HALF, "nll-restore") == (-0.1, "holds")
    assert verdict(BEST_HALF, "best") == (0.4, "holds")
    assert verdict(BEST_QUARTER, "nll-restore") == (-0.5, "reversed")
    assert verdict(MEAN_QUARTER, "nll-restore") == (0.375, "holds")
    # As good on the mean, by one nat better or worse on each example.
    assert verdict(LAZY, "nll-restore") == (0, "not clear")
    assert verdict(LAZY, "best") == (0.5, "holds")
    same = NLL.find(BEST_QUARTER, model, "best")
    assert (same.same, same.verdict) == (True, "not clear")
    found = NLL.find(LAZY, model, "best").advantage
    # Differences of -0.5 and 1.5 in turn: a sample deviation of sqrt(100 / 99).
    reach = 1.959964 * (100 / 99) ** 0.5 / 10
    assert found.low == pytest.approx(0.5 - reach, abs=1e-6)
    assert found.high == pytest.approx(0.5 + reach, abs=1e-6)
    # Just beyond the margin, at it, and within.
    for low, high, expected in (
        (-0.4, -0.21, "reversed"),
        (-0.4, -0.19, "not clear"),
        (-0.19, 0.1, "holds"),
    ):
        advantage = selectors_results.Advantage((low + high) / 2, low, high)
        assert selectors_ordering.judge(advantage, 0.2) == expected


def test_verdicts_by_accuracy(model: selectors_results.Model) -> None:
    # Close is within 0.05 x 90 points. Of 100 questions 14 are lost and none won: with Wilson's
    # intervals, [0.085, 0.221] and [0, 0.037], at least 7 points are lost.
    found = ACCURACY.find(BEST_HALF, model, "nll-restore")
    assert found.advantage.mean == pytest.approx(-0.14)
    assert found.advantage.high == pytest.approx(-0.14 + (0.0547**2 + 0.0370**2) ** 0.5, abs=2e-4)
    assert found.verdict == "reversed"
    # As good as the other offset, so half as much against the mean.
    found = ACCURACY.find(MEAN_HALF, model, "nll-restore")
    assert found.advantage.mean == pytest.approx(-0.07)
    assert found.verdict == "not clear"
    assert ACCURACY.find(MEAN_QUARTER, model, "nll-restore").verdict == "holds"


def test_the_record(tmp_path: Path) -> None:
    path = results_file(tmp_path)
    selectors_record.write(path, tmp_path / "pictures" / "p.png")
    text = path.with_suffix(".md").read_text()
    assert "](pictures/p.png)" in text
    assert (tmp_path / "pictures" / "p.png").read_bytes().startswith(b"\x89PNG")

    # Selectors of the same layers share a row.
    (shared,) = rows(text, "`greedy` (0.50), ")
    assert shared[0] == "`greedy` (0.50), `best` (1.20), periodic offset 0"
    assert shared[1:] == ["0", "0.800 [0.711, 0.867]", "0.500 ± 0.010", "itself", "0.000", "1 of 4"]
    (lazy,) = rows(text, "`lazy` (0.10), periodic offset 3")
    assert lazy[4:] == ["+0.500 ± 0.101", "0.500", "2 of 4"]
    # Not every half was run: no rank.
    (half,) = rows(text, "`greedy` (0.70), random seed 0")
    assert half[4:] == ["-0.700 ± 0.000"]

    # `greedy` is better at 1/2, by loss alone; seed 0 draws the same layers.
    beaten = [line for line in text.splitlines() if " beats `best`" in line]
    assert beaten == [
        "- small 1/2, NLL: `greedy` (0, 1) beats `best` (0, 3) by +0.200 [+0.200, +0.200]",
        "- small 1/2, NLL: random, seed 0 (0, 1) beats `best` (0, 3) by +0.200 [+0.200, +0.200]",
    ]
    assert ["small 1/4", "4", "0", "1.500", "0.500", "2 of 4 selectors"] in rows(text, "small 1/4")
    assert "there being too many: small 1/2." in text
    assert "by NLL, `nll-restore`: 3 of 5 comparisons hold, 1 reversed, 1 not clear" in text


def test_the_summary_is_sorted_and_names_the_worst_model(tmp_path: Path) -> None:
    plans = QUARTER + EVERY_QUARTER
    worse = changed("1/4", [p | {"nll_above": 1.5} if p["name"] == "greedy" else p for p in plans])
    path = results_file(tmp_path, worse)
    selectors_record.write(path)
    assert path.with_suffix(".png").is_file()
    text = path.with_suffix(".md").read_text()
    summary = text[text.index("## Summary") : text.index("## The default")]
    (greedy,) = rows(summary, "`greedy`")
    assert greedy[1:3] == ["0.600", "1.000 (worse 0 1.500)"]
    assert greedy[-1] == "0.60"
    ways = [row[0] for row in rows(summary, "")[2:]]
    assert ways[:2] == ["`best`", "`greedy`"]
    assert ways[-1] == "periodic, worst offset"
    # The picture of numbers beside the script is in the documentation.
    assert selectors_record.picture_of(ROOT / "benchmarks" / "selectors.json") == (
        ROOT / "docs" / "selectors.png"
    )


def test_other_draws_say_how_much_a_choice_depends_on_its_examples(tmp_path: Path) -> None:
    results = selectors_results.load(results_file(tmp_path))
    section = selectors_seeds.seeds(results)
    assert "seeds 0, 7" in section[1]
    (greedy,) = rows(section[2], "`greedy`")
    # 0.5 twice at 1/4; at 1/2 0.2 and 0.9.
    assert greedy[1:] == ["0.525", "0.700 (small 1/2: 1, 3 for 0, 1)", "1 of 2"]
    assert selectors_seeds.mean_over_draws(results)["greedy"] == pytest.approx(0.525)
    assert not rows(section[2], "`best`"), "it was not drawn again"


def test_the_documentation_gets_the_short_table_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    marks = (selectors_docs._BEGIN, selectors_docs._END)
    page.write_text(f"before\n{marks[0]}\nold\n{marks[1]}\nafter\n")
    results = selectors_results.load(results_file(tmp_path))
    for _ in range(2):
        selectors_docs.update(page, results)
        text = page.read_text()
        assert text.startswith("before\n")
        assert text.endswith(f"{marks[1]}\nafter\n")
        assert "old" not in text
        (greedy,) = rows(text, "`greedy`")
        assert greedy == ["`greedy`", "0.500", "0.200", "15.0", "0.525", "0.60"]


def test_guided_search_is_held_against_the_full_one_example_by_example(tmp_path: Path) -> None:
    apart = [plan("search", [0], 1.5, 80, 600), plan("guided", [3], 2, 74, 200, wave=1)]
    same = [plan("search", [0, 1], 1.2, 90, 900), plan("guided", [0, 1], 1.2, 90, 300)]
    budgets: Any = MODEL["budgets"]
    more = {
        budget: found | {"plans": found["plans"] + plans}
        for (budget, found), plans in zip(budgets.items(), (apart, same), strict=True)
    }
    results = selectors_results.load(results_file(tmp_path, MODEL | {"budgets": more}))
    text = "\n".join(selectors_findings.guided_against_search(results))
    # Half a nat, by turns one and a half more and half a nat less: 0.5 ± 1.96 x 0.1005.
    assert rows(text, "worse 0") == [
        ["worse 0 1/4", "+0.500 [+0.303, +0.697]", "0.20", "0.60", "0.33"],
        ["worse 0 1/2", "the same layers", "0.30", "0.90", "0.33"],
    ]
    assert rows(text, "small") == []
