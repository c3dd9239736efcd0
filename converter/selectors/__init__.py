"""The table of selectors: a new one is one file and one line here."""

from __future__ import annotations

from converter.selectors.base import ExampleScores, MeasuredSelector, rank
from converter.selectors.first_order import FIRST_ORDER
from converter.selectors.nll_remove import NLL_REMOVE
from converter.selectors.nll_restore import NLL_RESTORE
from converter.selectors.path_integral import PATH_INTEGRAL
from converter.selectors.periodic import PERIODIC, periodic_layers, periodic_offsets

MEASURED: dict[str, MeasuredSelector] = {
    selector.name: selector for selector in (NLL_RESTORE, NLL_REMOVE, FIRST_ORDER, PATH_INTEGRAL)
}
METHODS = (*MEASURED, PERIODIC)

__all__ = [
    "MEASURED",
    "METHODS",
    "PERIODIC",
    "ExampleScores",
    "MeasuredSelector",
    "periodic_layers",
    "periodic_offsets",
    "rank",
]
