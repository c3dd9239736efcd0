"""The tables of selectors: a new one is one file and one line here."""

from __future__ import annotations

from converter.calibration.selectors.base import (
    Baseline,
    Choice,
    ExampleScores,
    Scorer,
    Selector,
    means,
    rank,
)
from converter.calibration.selectors.beam import BEAM
from converter.calibration.selectors.by_score import by_score
from converter.calibration.selectors.evolution import EVOLUTION
from converter.calibration.selectors.first_order import FIRST_ORDER
from converter.calibration.selectors.fixed import FIRST, LAST, MIDDLE, RANDOM
from converter.calibration.selectors.gates import GATES, GATES_BUDGET, GATES_HEADS
from converter.calibration.selectors.greedy import GREEDY
from converter.calibration.selectors.kl import KL, KL_ALL
from converter.calibration.selectors.lazy import LAZY, LAZY_INVERTED
from converter.calibration.selectors.nll_remove import NLL_REMOVE
from converter.calibration.selectors.nll_restore import NLL_RESTORE
from converter.calibration.selectors.path_integral import PATH_INTEGRAL
from converter.calibration.selectors.periodic import PERIODIC, periodic_layers, periodic_offsets
from converter.calibration.selectors.search import SEARCH
from converter.calibration.selectors.surrogate import SURROGATE
from converter.calibration.selectors.two_sided import TWO_SIDED

# Score layers one by one.
SCORERS: dict[str, Scorer] = {
    scorer.name: scorer
    for scorer in (NLL_RESTORE, NLL_REMOVE, KL, KL_ALL, FIRST_ORDER, PATH_INTEGRAL)
}
# Choose layers by running the model.
SELECTORS: dict[str, Selector] = {
    selector.name: selector
    for selector in (
        *map(by_score, SCORERS.values()),
        TWO_SIDED,
        LAZY,
        LAZY_INVERTED,
        GATES,
        GATES_BUDGET,
        GATES_HEADS,
        GREEDY,
        SEARCH,
        BEAM,
        EVOLUTION,
        SURROGATE,
    )
}
# Choose layers without.
BASELINES: dict[str, Baseline] = {
    baseline.name: baseline for baseline in (PERIODIC, FIRST, LAST, MIDDLE, RANDOM)
}

# As good as any where all were compared (benchmarks/selectors.md), and held against periodic plans.
BEST, ALL = "best", "all"
_CONTESTS = {BEST: (NLL_RESTORE.name, TWO_SIDED.name, SEARCH.name), ALL: (*SELECTORS, *BASELINES)}
METHODS = (BEST, ALL, *SELECTORS, *BASELINES)


def methods_of(text: str) -> tuple[str, ...]:
    """The methods that a setting names: one, several with commas, `best` or `all`."""
    return _CONTESTS.get(text, tuple(text.split(",")))


__all__ = [
    "ALL",
    "BASELINES",
    "BEST",
    "METHODS",
    "NLL_RESTORE",
    "PERIODIC",
    "SCORERS",
    "SELECTORS",
    "Baseline",
    "Choice",
    "ExampleScores",
    "Scorer",
    "Selector",
    "means",
    "methods_of",
    "periodic_layers",
    "periodic_offsets",
    "rank",
]
