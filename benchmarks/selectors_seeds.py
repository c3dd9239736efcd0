"""How much a choice depends on the calibration examples that it is made on."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from evaluation_record import table
from selectors_results import Results, SeedChoice
from selectors_text import code, layer_list, number


def seeds(results: Results) -> list[str]:
    """The section; nothing where there was one draw of calibration examples."""
    drawn = list(dict.fromkeys(choice.seed for choice in results.choices))
    if len(drawn) < 2:
        return []
    by_way: dict[str, list[SeedChoice]] = {}
    for choice in results.choices:
        by_way.setdefault(choice.way, []).append(choice)
    rows = [(code(way), *_row(choices)) for way, choices in by_way.items()]
    rows.sort(key=lambda row: float(row[1]))
    return [
        "## Other calibration examples",
        f"The same with calibration and validation examples drawn anew (seeds {', '.join(drawn)}), "
        "on the same test examples, without the dearest selectors: NLL above the original, mean "
        "over draws, models and budgets; "
        "the worst draw beside the best one of the same model and budget; and for how many of the "
        "models and budgets every draw chose the same layers.",
        table(("chosen by", "NLL above, all", "most that a draw cost", "same layers"), rows),
    ]


def mean_over_draws(results: Results) -> dict[str, float]:
    """Each selector's NLL above the original over draws, models and budgets, in nats per token."""
    ways = dict.fromkeys(choice.way for choice in results.choices)
    return {
        way: fmean(choice.above for choice in results.choices if choice.way == way) for way in ways
    }


def _row(choices: Sequence[SeedChoice]) -> tuple[str, str, str]:
    cases: dict[tuple[str, str], list[SeedChoice]] = {}
    for choice in choices:
        cases.setdefault((choice.model, choice.budget), []).append(choice)
    same = sum(len({choice.layers for choice in case}) == 1 for case in cases.values())
    spreads = []
    for (model, budget), case in cases.items():
        best = min(case, key=lambda choice: choice.above)
        worst = max(case, key=lambda choice: choice.above)
        what = f"{model} {budget}: {layer_list(worst.layers)} for {layer_list(best.layers)}"
        spreads.append((worst.above - best.above, what))
    spread, what = max(spreads)
    return (
        number(fmean(choice.above for choice in choices)),
        f"{number(spread)} ({what})" if same < len(cases) else "nothing",
        f"{same} of {len(cases)}",
    )
