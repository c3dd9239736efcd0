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
    plans_cost,
)
from converter.calibration.run import CalibrationRun
from converter.calibration.selectors import Selector
from converter.common.progress import Stage


def stages(run: CalibrationRun, task: CalibrationTask, bound: float | None) -> list[Stage]:
    """Every stage of a calibration, a loss bound and a quality report, by the names of their bars.

    Costs are in layer-forwards of this process, at most: what one stage finds out another need not,
    searches and races may end early, and a run that is resumed has something already.

    Args:
        bound: the loss that decides the number of layers, if one does.
    """
    shape, keep, examples = run.source.shape, task.keep, run.examples
    total = len(shape.full_layers)
    measuring = [selector for selector in task.methods if selector.measures]
    found = _choosing(run, measuring, keep)
    if task.compares(total):
        found[VALIDATION] = task.contest_passes * shape.layers * len(examples.scored)
    if task.by_kind:
        for kind in dict.fromkeys(example.kind for example in examples.scored):
            mine = [example for example in examples.scored if example.kind == kind]
            found[kind] = expected_cost(measuring[-1], mine, run.mask, shape, keep)
    if bound is not None:
        steps = 1 + total.bit_length()
        found[LOSS_BOUND] = float(
            min(BOUND_EXAMPLES, len(examples.validation)) * shape.layers * steps
        )
    if examples.held_out:
        found[QUALITY] = plans_cost(
            run, [*_fronts(total), *_periodic(total, keep)], examples.held_out
        )
    return _listed(run, found)


def curve_stages(run: CalibrationRun, methods: Sequence[Selector]) -> list[Stage]:
    """As `stages`, of what every number of full layers costs.

    Args:
        methods: what makes the orders that are still to be found; without any there is one order.
    """
    total, held_out = len(run.source.shape.full_layers), run.examples.held_out
    fronts = _fronts(total)
    spaced = [plan for count in range(1, total) for plan in _periodic(total, count)]
    found = _choosing(run, methods, total)
    found[QUALITY] = plans_cost(run, [*fronts, *spaced], held_out)
    # Two orders have the ends in common at least.
    found[QUALITY] += max(0, len(methods) - 1) * plans_cost(run, fronts[1:-1], held_out)
    return _listed(run, found)


def _choosing(run: CalibrationRun, methods: Sequence[Selector], keep: int) -> dict[str, float]:
    examples, shape = run.examples.scored, run.source.shape
    return {one.name: expected_cost(one, examples, run.mask, shape, keep) for one in methods}


def _fronts(total: int) -> list[frozenset[int]]:
    """Plans of every number of full layers, each with the layers of the one before."""
    return [frozenset(range(count)) for count in range(total + 1)]


def _periodic(total: int, keep: int) -> list[frozenset[int]]:
    return [frozenset(one.layers) for one in periodic_candidates(range(total), keep)]


def _listed(run: CalibrationRun, costs: dict[str, float]) -> list[Stage]:
    return [Stage(name, cost / run.processes.count) for name, cost in costs.items()]
