"""The table of selectors: a new one is one file and one line here."""

from __future__ import annotations

from converter.selectors.base import MeasuredSelector, rank
from converter.selectors.nll_remove import NLL_REMOVE
from converter.selectors.nll_restore import NLL_RESTORE
from converter.selectors.periodic import PERIODIC, periodic_layers, periodic_offsets

MEASURED: dict[str, MeasuredSelector] = {
    selector.name: selector for selector in (NLL_RESTORE, NLL_REMOVE)
}
METHODS = (*MEASURED, PERIODIC)

__all__ = [
    "MEASURED",
    "METHODS",
    "PERIODIC",
    "MeasuredSelector",
    "periodic_layers",
    "periodic_offsets",
    "rank",
]
