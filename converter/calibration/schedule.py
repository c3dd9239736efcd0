"""The stages of a measurement, and what each may cost, before the first begins."""

from __future__ import annotations

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
    several = len(task.methods) > 1
    found = {
        selector.name if several else "scores": expected_cost(
            selector, examples.scored, run.mask, shape, keep
        )
        for selector in measuring
    }
    periodic = [candidate.layers for candidate in periodic_candidates(range(total), keep)]
    whole = tuple(range(total))
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
        fronts = [whole[:count] for count in range(total + 1)]
        plans = [frozenset(layers) for layers in (*fronts, *periodic)]
        found[QUALITY] = plans_cost(run, plans, examples.held_out)
    return [Stage(name, cost / run.processes.count) for name, cost in found.items()]
