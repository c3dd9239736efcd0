"""What the comparison of selectors says of the default, and of the best plans there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from evaluation_record import table
from selectors_ordering import MEASURES
from selectors_results import Advantage, Budget, EveryPlan, Results, Run, loss_advantage
from selectors_text import code, interval, layer_list, number

from converter.calibration.selectors import BEST
from converter.calibration.selectors.guided import GUIDED
from converter.calibration.selectors.search import SEARCH

_AGAINST = ("same layers", "lower", "not clear", "higher")
# A budget of a model all of whose plans were run: its name, the plans, the budget.
_Complete = tuple[str, EveryPlan, Budget]


@dataclass(frozen=True)
class _Place:
    """Where a choice stands among all plans.

    Attributes:
        at: of which model and budget.
        distance: nats above the best plan.
        found: it is the best plan.
        better: the share of plans that are better.
    """

    at: str
    distance: float
    found: bool
    better: float


def default(results: Results) -> list[str]:
    """The section on how the default does against every other way of choosing."""
    verdicts: dict[str, Counter[str]] = {}
    beaten = []
    compared = 0
    for model, budget in results.budgets:
        best = budget.run(BEST)
        for run in budget.choices:
            if run is best:
                continue
            compared += run.layers != best.layers
            found = [measure.advantage(best, [run]) for measure in MEASURES]
            verdicts.setdefault(run.way, Counter())[_against(best, run, found[1])] += 1
            plans = f"{code(run.name)} ({layer_list(run.layers)}) beats {code(BEST)} "
            plans += f"({layer_list(best.layers)})"
            beaten += [
                f"- {model.name} {budget.name}, {measure.name}: {plans} by "
                f"{interval(advantage.turned())}"
                for measure, advantage in zip(MEASURES, found, strict=True)
                if advantage.high < 0
            ]
    return [
        f"## The default, `{BEST}`, against every other",
        "How often its NLL is lower or higher with the whole 95% interval of the paired "
        "difference, over models and budgets, and over offsets or seeds.",
        table(
            ("against", *_AGAINST),
            [(code(way), *(count[kind] for kind in _AGAINST)) for way, count in verdicts.items()],
        ),
        f"Where `{BEST}` is beaten on the test examples beyond the interval, in NLL or accuracy "
        f"({compared} comparisons with plans of other layers, each with a 95% interval of its own, "
        "so that one in forty would be here by chance if all were equally good):",
        "\n".join(beaten) or "- nowhere.",
    ]


def _against(best: Run, run: Run, advantage: Advantage) -> str:
    if run.layers == best.layers:
        return "same layers"
    if advantage.low > 0:
        return "lower"
    return "higher" if advantage.high < 0 else "not clear"


def guided_against_search(results: Results) -> list[str]:
    """The section on guided search beside the one that measures every layer; nothing without."""
    rows = []
    for model, budget in results.budgets:
        runs = {run.name: run for run in budget.selectors}
        if not {GUIDED.name, SEARCH.name} <= runs.keys():
            continue
        guided, search = runs[GUIDED.name], runs[SEARCH.name]
        above = interval(loss_advantage(guided, [search]).turned())
        costs = [budget.cost(run) or 0.0 for run in (guided, search)]
        rows.append(
            (
                f"{model.name} {budget.name}",
                "the same layers" if guided.layers == search.layers else above,
                *(f"{cost:.2f}" for cost in costs),
                f"{costs[0] / costs[1]:.2f}",
            )
        )
    if not rows:
        return []
    return [
        f"## `{GUIDED.name}` against `{SEARCH.name}`",
        "NLL above the plan of the search that measures every layer, nats per token, with the 95% "
        "interval of the paired difference, and what both choices cost.",
        table(("at", "above", GUIDED.name, SEARCH.name, "of the search's cost"), rows),
    ]


def every_plan(results: Results) -> list[str]:
    """The section on the best plans there are, and how close each way of choosing comes."""
    budgets = [(f"{model.name} {budget.name}", budget) for model, budget in results.budgets]
    complete = [(name, b.every, b) for name, b in budgets if b.every is not None]
    missing = [name for name, budget in budgets if budget.every is None]
    parts = ["## Every plan there is"]
    if missing:
        parts.append(f"Not every plan was run, there being too many: {', '.join(missing)}.")
    if not complete:
        return parts
    return [
        *parts,
        "The best plan is told by the test examples, so that a part of the distance to it is "
        "luck: no selector could have known.",
        table(
            ("at", "plans", "best plan", "its NLL", "above the original", "found by"),
            [_truth(name, every, budget) for name, every, budget in complete],
        ),
        "How far above the best plan's NLL each way of choosing ends, where all plans were run, "
        "and the largest share of plans that are better. The last row is the mean over all plans.",
        table(
            ("chosen by", "best plan found", "mean distance", "largest distance", "plans better"),
            _distances(complete),
        ),
    ]


def _truth(name: str, every: EveryPlan, budget: Budget) -> tuple[object, ...]:
    best = every.best
    found = sum(run.layers == best for run in budget.selectors)
    return (
        name,
        len(every.losses),
        layer_list(best),
        number(every.losses[best]),
        number(every.losses[best] - budget.original.loss),
        f"{found} of {len(budget.selectors)} selectors",
    )


def _distances(complete: Sequence[_Complete]) -> list[tuple[object, ...]]:
    ways: dict[str, list[_Place]] = {}
    for name, every, budget in complete:
        for run in budget.choices:
            ahead = every.rank(run.layers) - 1
            place = _Place(name, every.distance(run.layers), ahead == 0, ahead / len(every.losses))
            ways.setdefault(run.way, []).append(place)
    means = {way: fmean(place.distance for place in places) for way, places in ways.items()}
    rows: list[tuple[object, ...]] = []
    for way in sorted(ways, key=lambda way: means[way]):
        places = ways[way]
        found = f"{sum(place.found for place in places)} of {len(places)}"
        worst = max(places, key=lambda place: place.distance)
        largest = f"{number(worst.distance)} ({worst.at})"
        better = f"{max(place.better for place in places):.0%}"
        rows.append((code(way), found, number(means[way]), largest, better))
    mean = fmean(every.mean_distance for _, every, _ in complete)
    return [*rows, ("any plan", "", number(mean), "", "")]
