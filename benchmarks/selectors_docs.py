"""The part of the documentation's page on choosing layers that follows from the comparison."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from evaluation_record import table
from rival_searches import GREEDY
from rival_selectors import TWO_SIDED
from selectors_results import Results
from selectors_seeds import mean_over_draws
from selectors_text import code, number

from converter.calibration.selectors import BEST, PERIODIC, SELECTORS

_BEGIN = "<!-- the table below is written by benchmarks/compare_selectors.py -->"
_END = "<!-- end -->"
# The record has every way; the page the product's, and what they are most like.
_SHOWN = (BEST, *SELECTORS, TWO_SIDED.name, GREEDY.name)


def update(page: Path, results: Results) -> None:
    """Write the short table between the page's marks."""
    before, rest = page.read_text(encoding="utf-8").split(_BEGIN)
    after = rest.split(_END)[1]
    text = f"{before}{_BEGIN}\n{_short(results)}\n{_END}{after}"
    page.write_text(text, encoding="utf-8")


def _short(results: Results) -> str:
    """What each way of choosing loses by budget, and costs: means over models."""
    names = list(results.models[0].budgets)
    scores = [(budget.name, budget.scores()) for _, budget in results.budgets]
    draws = mean_over_draws(results)
    rows = []
    for way in results.ways():
        if way not in _SHOWN and not way.startswith(PERIODIC.name):
            continue
        by_budget = [[found[way] for name, found in scores if name == budget] for budget in names]
        costs = [score.cost for cells in by_budget for score in cells if score.cost is not None]
        rows.append(
            (
                code(way),
                *(number(fmean(score.above for score in cells)) for cells in by_budget),
                f"{100 * fmean(score.lost for score in by_budget[names.index('1/4')]):.1f}",
                number(draws[way]) if way in draws else "",
                f"{fmean(costs):.2f}" if costs else "none",
            )
        )
    return table(
        (
            "chosen by",
            *(f"NLL above, {name}" for name in names),
            "points of accuracy lost, 1/4",
            "NLL above, all budgets and draws",
            "cost",
        ),
        rows,
    )
