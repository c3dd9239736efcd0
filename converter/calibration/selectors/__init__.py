"""The table of selectors: a new one is one file and one line here."""

from __future__ import annotations

from dataclasses import replace

from converter.calibration.selectors.base import Selector as Selector
from converter.calibration.selectors.baselines import PERIODIC as PERIODIC
from converter.calibration.selectors.baselines import periodic_among as periodic_among
from converter.calibration.selectors.baselines import periodic_layers as periodic_layers
from converter.calibration.selectors.baselines import periodic_offsets as periodic_offsets
from converter.calibration.selectors.gates import GATES
from converter.calibration.selectors.guided import EFFORTS as EFFORTS
from converter.calibration.selectors.guided import GUIDED
from converter.calibration.selectors.guided import NORMAL as NORMAL
from converter.calibration.selectors.lazy import LAZY
from converter.calibration.selectors.one_layer import (
    KL,
    NLL_REMOVE,
    NLL_RESTORE,
    PATH_INTEGRAL,
)
from converter.calibration.selectors.ranking import LayerSelector
from converter.calibration.selectors.search import SEARCH
from converter.common.errors import UsageError

SELECTORS: dict[str, Selector] = {
    selector.name: selector
    for selector in (
        NLL_RESTORE,
        NLL_REMOVE,
        KL,
        PATH_INTEGRAL,
        LAZY,
        GATES,
        SEARCH,
        GUIDED,
        PERIODIC,
    )
}
# Those that run the model.
MEASURING = tuple(name for name, selector in SELECTORS.items() if selector.measures)

# Held against periodic plans: the search, and what it insures against is told by few examples.
BEST, ALL = "best", "all"
_SEVERAL = {BEST: (NLL_RESTORE.name, GUIDED.name), ALL: tuple(SELECTORS)}
_INSURANCE = replace(NLL_RESTORE, most_examples=16)
METHODS = (BEST, ALL, *SELECTORS)


def methods_of(text: str) -> tuple[str, ...]:
    """The methods that a setting names: one, several with commas, `best` or `all`."""
    return _SEVERAL.get(text, tuple(text.split(",")))


def selectors_of(text: str, effort: str = NORMAL) -> tuple[Selector, ...]:
    """Their selectors, guided search with as much effort as one of `EFFORTS`."""
    guided = replace(GUIDED, passes=EFFORTS[effort])
    if text == BEST:
        return (_INSURANCE, guided)
    return tuple(guided if name == GUIDED.name else SELECTORS[name] for name in methods_of(text))


def measuring_of(text: str, effort: str = NORMAL) -> tuple[Selector, ...]:
    """The selectors of methods of which some run the model.

    Raises:
        UsageError: none does.
    """
    found = selectors_of(text, effort)
    if not any(one.measures for one in found):
        raise UsageError(
            "this method measures nothing",
            where="--method",
            expected=", ".join(MEASURING),
            got=text,
        )
    return found


def nested_of(text: str, effort: str = NORMAL) -> tuple[Selector, ...]:
    """Those of the methods whose order serves every number of full layers.

    Raises:
        UsageError: there are none.
    """
    nested = tuple(one for one in selectors_of(text, effort) if one.measures and one.nested)
    if not nested:
        raise UsageError(
            "plans for several numbers of layers need one order of the layers, and this makes none",
            where="--method",
            expected="one that does, such as guided",
            got=text,
        )
    return nested


def scorer_of(method: str) -> LayerSelector:
    """The method's own selector where it scores layers one by one; else restore-one."""
    selector = SELECTORS.get(method)
    return selector if isinstance(selector, LayerSelector) else NLL_RESTORE
