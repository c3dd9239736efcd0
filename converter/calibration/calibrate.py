"""Calibration: selectors look at a model, and what they choose is held against each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from converter.calibration.comparison import (
    VALIDATION,
    Candidate,
    check_validation,
    outcomes,
    periodic_candidates,
)
from converter.calibration.evaluator import (
    DEFAULT_OBJECTIVE,
    THOROUGH,
    PlanEvaluator,
    ScoringOptions,
    open_evaluator,
)
from converter.calibration.objective import Objective
from converter.calibration.results import ComparedPlan, MethodComparison
from converter.calibration.run import CalibrationRun
from converter.calibration.scores import Scores
from converter.calibration.selectors import BASELINES, PERIODIC, SELECTORS, Choice
from converter.common.progress import Progress
from converter.inference.positions import token_spans


@dataclass(frozen=True)
class Task:
    """What a calibration is to find out.

    Attributes:
        methods: what chooses; several hold a contest, in which periodic plans take part.
        keep: how many layers the plan is to keep.
        effort: what may be left out where a single method scores layers.
        objective: what is to become small.
        by_kind: choose for every kind of input by itself, too.
        seed: of random choices.
    """

    methods: tuple[str, ...]
    keep: int
    effort: ScoringOptions = THOROUGH
    objective: Objective = DEFAULT_OBJECTIVE
    by_kind: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Calibration:
    """Scores, and the time it took to measure them, on all processes together."""

    scores: Scores
    seconds: float


def calibrate(run: CalibrationRun, task: Task, progress: Progress) -> Calibration:
    """Choose layers by what the examples say.

    Raises:
        ScoresError: the work folder holds results of another measurement.
        DataError: the model's loss is not a finite number, or there is no example for a contest.
        OutputError: the work folder cannot be written.
    """
    examples = run.examples.scored
    compared = len(task.methods) > 1 and 0 < task.keep < run.source.shape.layers
    if compared:
        # Said now, not when everybody has chosen.
        check_validation(run.examples)
    with open_evaluator(run, examples, "scores", task.objective, task.effort) as evaluator:
        if evaluator.found_earlier:
            run.say(f"resuming: {evaluator.found_earlier} pieces were found earlier")
        found = {
            name: _choose(
                evaluator, name, task, progress, name if len(task.methods) > 1 else "scores"
            )
            for name in task.methods
            if name in SELECTORS
        }
        seconds = evaluator.seconds
        comparison = _comparison(run, task, found, progress) if compared else None
        # Where there is nothing to choose no contest is held, and any method will do.
        winner = comparison.winner if comparison is not None else list(found)[-1]
        # A baseline may win; then the scores are those of the best method that measures.
        method = winner if winner in found else _best_measured(comparison, found)
        choice, order = found[method].choice, found[method].choice.order
        if winner not in found and comparison is not None:
            kept = comparison.entry(winner).layers
            order = (*kept, *(layer for layer in order if layer not in kept))
        # No contest is held for each kind: the last method, which searches, decides.
        last = list(found)[-1]
        profiles = {
            kind: _choose(evaluator.only(kind), last, task, progress, kind).choice.order
            for kind in (dict.fromkeys(e.kind for e in examples) if task.by_kind else ())
        }
        scores = Scores(
            method=method,
            mask=run.mask,
            examples=choice.examples,
            layer_forwards=evaluator.layer_forwards,
            fingerprint=run.fingerprint(examples)
            | {"methods": list(task.methods), "objective": task.objective.name},
            order=order,
            race=choice.race,
            heads=choice.heads,
            comparison=comparison,
            profiles=profiles,
        )
        return Calibration(scores, seconds)


@dataclass(frozen=True)
class _Found:
    """What a selector chose, and what it alone would have cost."""

    choice: Choice
    layer_forwards: float


def _choose(
    evaluator: PlanEvaluator, name: str, task: Task, progress: Progress, title: str
) -> _Found:
    selector = SELECTORS[name]
    expected = math.fsum(
        selector.cost(
            token_spans(example, evaluator.mask), evaluator.mask, evaluator.total, task.keep
        )
        for example in evaluator.examples
    )
    with evaluator.tallying(title, expected, progress) as tally:
        choice = selector.choose(evaluator, task.keep)
    return _Found(choice, tally.layer_forwards)


def _comparison(
    run: CalibrationRun, task: Task, found: Mapping[str, _Found], progress: Progress
) -> MethodComparison:
    """Run what was chosen, and the baselines, on examples that nothing was chosen on."""
    total, keep = run.source.shape.layers, task.keep
    candidates = [Candidate(name, one.choice.order[:keep]) for name, one in found.items()]
    candidates += periodic_candidates(total, keep)
    for name in task.methods:
        if name in BASELINES and name != PERIODIC.name:
            candidates.append(Candidate(name, BASELINES[name].layers(total, keep, task.seed)))
    candidates.append(Candidate("original", tuple(range(total))))
    examples = run.examples.validation
    *others, original = outcomes(run, examples, VALIDATION, candidates, progress)
    kinds = [example.kind for example in examples]
    entries = tuple(
        ComparedPlan(
            outcome,
            task.objective.value(kinds, outcome.nll, original.nll),
            found[outcome.name].layer_forwards if outcome.name in found else 0.0,
        )
        for outcome in others
    )
    return MethodComparison(keep, entries, original)


def _best_measured(comparison: MethodComparison | None, found: Mapping[str, _Found]) -> str:
    if comparison is None:
        return list(found)[-1]
    return min(found, key=lambda name: comparison.entry(name).value)
