"""The table of selectors: a new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Sequence
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
from converter.plan.units import LAYER

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


def problem_of(method: str) -> str | None:
    """What is wrong with a list of methods, each of them known."""
    names = method.split(",")
    if len(names) == 1:
        return None
    if {BEST, ALL} & set(names):
        return f"method: {BEST} and {ALL} stand alone, got {method!r}"
    if len(set(names)) < len(names):
        return f"method: a name is given twice, got {method!r}"
    return None


def selectors_of(text: str, effort: str = NORMAL, granularity: str = LAYER) -> tuple[Selector, ...]:
    """Their selectors, guided search with as much effort as one of `EFFORTS`.

    The best plan of KV heads is held against guided search's plan of layers.

    Raises:
        UsageError: a method cannot tell the KV heads of a layer apart, which is asked for.
    """
    guided = replace(GUIDED, passes=EFFORTS[effort])
    if text == BEST:
        insured = _INSURANCE if granularity == LAYER else guided
        return (insured, replace(guided, granularity=granularity))
    named = [
        guided if name == GUIDED.name else SELECTORS[name]
        for name in _SEVERAL.get(text, tuple(text.split(",")))
    ]
    whole = [one.name for one in named if granularity != LAYER and not one.tells_heads]
    if whole:
        raise UsageError(
            "a method cannot tell the KV heads of a layer apart",
            where="--method",
            expected=", ".join(name for name, one in SELECTORS.items() if one.tells_heads),
            got=", ".join(whole),
        )
    return tuple(replace(one, granularity=granularity) for one in named)


def labels_of(text: str, granularity: str) -> list[str]:
    """What results call the choices of the methods that a setting names."""
    return [one.label for one in selectors_of(text, granularity=granularity)]


def measuring(selectors: Sequence[Selector]) -> tuple[Selector, ...]:
    """The selectors, of which some run the model.

    Raises:
        UsageError: none does.
    """
    if not any(one.measures for one in selectors):
        raise UsageError(
            "this method measures nothing",
            where="--method",
            expected=", ".join(MEASURING),
            got=", ".join(one.name for one in selectors),
        )
    return tuple(selectors)


def nested(selectors: Sequence[Selector]) -> tuple[Selector, ...]:
    """Those whose order serves every number of full layers.

    Raises:
        UsageError: there are none.
    """
    found = tuple(one for one in selectors if one.measures and one.nested)
    if not found:
        raise UsageError(
            "plans of several sizes need one order of the layers, and this makes none",
            where="--method",
            expected="one that does, such as guided",
            got=", ".join(one.name for one in selectors),
        )
    return found


def scorer_of(method: str) -> LayerSelector:
    """The method's own selector where it scores layers one by one; else restore-one."""
    selector = SELECTORS.get(method)
    return selector if isinstance(selector, LayerSelector) else NLL_RESTORE
