"""The stages of a measurement, and what each may cost, before the first begins."""

from __future__ import annotations

from collections.abc import Sequence

from converter.calibration.calibrate import CalibrationTask, expected_cost
from converter.calibration.comparison import (
    BOUND_EXAMPLES,
    LOSS_BOUND,
    QUALITY,
    VALIDATION,
    periodic_candidates,
    places,
    plans_cost,
)
from converter.calibration.run import CalibrationRun
from converter.calibration.selectors import Selector
from converter.common.progress import Stage
from converter.plan.units import Units


def stages(run: CalibrationRun, task: CalibrationTask, bound: float | None) -> list[Stage]:
    """Every stage of a calibration, a loss bound and a quality report, by the names of their bars.

    Costs are in layer-forwards of this process, at most: what one stage finds out another need not,
    searches and races may end early, and a run that is resumed has something already.

    Args:
        bound: the loss that decides the number of layers, if one does.
    """
    shape, keep, examples, units = run.source.shape, task.keep, run.examples, run.units
    measuring = [selector for selector in task.methods if selector.measures]
    found = _choosing(run, measuring, keep)
    if task.compares(units):
        found[VALIDATION] = task.contest_passes * shape.layers * len(examples.scored)
    if task.by_kind:
        for kind in dict.fromkeys(example.kind for example in examples.scored):
            mine = [example for example in examples.scored if example.kind == kind]
            found[kind] = expected_cost(run, measuring[-1], mine, keep)
    if bound is not None:
        steps = 1 + units.total.bit_length()
        found[LOSS_BOUND] = float(
            min(BOUND_EXAMPLES, len(examples.validation)) * shape.layers * steps
        )
    if examples.held_out:
        found[QUALITY] = plans_cost(
            run, [*_fronts(units), *_periodic(run, keep)], examples.held_out
        )
    return _listed(run, found)


def curve_stages(run: CalibrationRun, methods: Sequence[Selector]) -> list[Stage]:
    """As `stages`, of what every number of full layers costs.

    Args:
        methods: what makes the orders that are still to be found; without any there is one order.
    """
    units, held_out = run.units, run.examples.held_out
    fronts = _fronts(units)
    spaced = [
        plan for count in range(1, units.layers) for plan in _periodic(run, count * units.per_layer)
    ]
    found = _choosing(run, methods, units.total)
    found[QUALITY] = plans_cost(run, [*fronts, *spaced], held_out)
    # Two orders have the ends in common at least.
    found[QUALITY] += max(0, len(methods) - 1) * plans_cost(run, fronts[1:-1], held_out)
    return _listed(run, found)


def _choosing(run: CalibrationRun, methods: Sequence[Selector], keep: int) -> dict[str, float]:
    return {one.label: expected_cost(run, one, run.examples.scored, keep) for one in methods}


def _fronts(units: Units) -> list[frozenset[int]]:
    """Plans of every number of full layers, each with the layers of the one before."""
    return [frozenset(units.of_layers(range(count))) for count in range(units.layers + 1)]


def _periodic(run: CalibrationRun, keep: int) -> list[frozenset[int]]:
    return [places(run, one.full) for one in periodic_candidates(run, keep)]


def _listed(run: CalibrationRun, costs: dict[str, float]) -> list[Stage]:
    return [Stage(name, cost / run.processes.count) for name, cost in costs.items()]
