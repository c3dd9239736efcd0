"""Calibration: selectors look at a model, and what they choose is held against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum

from converter.calibration.comparison import (
    Candidate,
    Contest,
    check_validation,
    hold_contest,
    periodic_candidates,
)
from converter.calibration.data.examples import Examples
from converter.calibration.evaluator import PlanEvaluator, open_evaluator
from converter.calibration.results import ComparedPlan, MethodComparison, Outcome
from converter.calibration.run import CalibrationRun
from converter.calibration.scores import Drawn, Scores
from converter.calibration.selectors.base import Choice, Selector
from converter.common.progress import Progress
from converter.inference.example import Example
from converter.inference.positions import TokenSpans, token_spans
from converter.model.mask import Mask
from converter.plan.units import LAYER, Units

# How many passes of the model over each scored example comparing choices may take.
CONTEST_PASSES = 4.5


@dataclass(frozen=True)
class CalibrationTask:
    """What a calibration is to find out.

    Attributes:
        methods: what chooses, at least one of them by measuring. Several are compared, in which
            periodic plans at every offset take part.
        keep: how many layers, or KV heads, the plan is to keep.
        race: whether scoring may stop where it is clear which layers are kept.
        by_kind: choose for every kind of input by itself, too.
        contest_passes: of the model over each scored example, what comparing may take.
    """

    methods: tuple[Selector, ...]
    keep: int
    race: bool = False
    by_kind: bool = False
    contest_passes: float = CONTEST_PASSES

    def compares(self, units: Units) -> bool:
        """Whether choices are held against each other: where a whole layer is kept, and not all."""
        return len(self.methods) > 1 and units.per_layer <= self.keep < units.total

    def cost(self, spans: Sequence[TokenSpans], mask: Mask, units: Units) -> float:
        """What all of it may take, in layer-forwards, on examples of such spans."""
        choosing = fsum(
            selector.cost(one, mask, *asked_of(selector, units, self.keep))
            for selector in self.methods
            for one in spans[: selector.most_examples]
        )
        compared = self.contest_passes if self.compares(units) else 0.0
        return choosing + compared * sum(one.depth(units.layers) for one in spans)


@dataclass(frozen=True)
class Calibration:
    """Scores, and what measuring them took.

    Attributes:
        scores: what was found.
        seconds: on all processes together.
        naive: layer-forwards of a whole pass for each unit, and one more, for each example.
    """

    scores: Scores
    seconds: float
    naive: int


@dataclass(frozen=True)
class _Found:
    """What a selector chose, and what it alone would have cost."""

    selector: Selector
    choice: Choice
    layer_forwards: float


def asked_of(selector: Selector, units: Units, keep: int) -> tuple[Units, int]:
    """What a selector chooses among, and how many, for a plan of `keep` units."""
    if selector.granularity == LAYER:
        return Units(units.layers), keep // units.per_layer
    return units, keep


def calibrate(run: CalibrationRun, task: CalibrationTask, progress: Progress) -> Calibration:
    """Choose layers or KV heads by what the examples say.

    Raises:
        ScoresError: the work folder holds results of another measurement.
        DataError: the model's loss is not a finite number, or there is no example to compare on.
        OutputError: the work folder cannot be written.
    """
    examples = run.examples.scored
    compared = task.compares(run.units)
    _say_cost(run, task)
    if compared:
        # Said now, not when everybody has chosen.
        check_validation(run.examples)
    with open_evaluator(run, examples, "scores", race=task.race) as evaluator:
        if earlier := evaluator.cache.found_earlier:
            run.say(f"resuming: {earlier} pieces were found earlier")
        measuring = [selector for selector in task.methods if selector.measures]
        found = {
            one.label: _choose(run, evaluator, one, task.keep, progress, one.label)
            for one in measuring
        }
        contest = _contest(run, task, found, progress) if compared else Contest([], 0.0, 0.0)
        comparison = _comparison(task, found, contest.outcomes) if compared else None
        best, order = _best(found, comparison)
        # Kinds are not compared: the last method, which searches, decides.
        kinds = dict.fromkeys(example.kind for example in examples) if task.by_kind else ()
        profiles = {
            kind: _choose(run, evaluator.only(kind), measuring[-1], task.keep, progress, kind)
            for kind in kinds
        }
        scores = Scores(
            method=best.selector.label,
            mask=run.mask,
            examples=best.choice.examples,
            layer_forwards=evaluator.layer_forwards + contest.layer_forwards,
            fingerprint=run.fingerprint(examples)
            | {"methods": [selector.label for selector in task.methods], "objective": "mean"},
            order=order,
            unit=best.selector.unit,
            race=best.choice.race,
            heads=best.choice.heads,
            comparison=comparison,
            profiles={kind: one.choice.order for kind, one in profiles.items()},
            drawn=_drawn(run.examples, compared),
            model_units=run.numbers if run.source.shape.kinds else (),
            kv_heads=run.units.per_layer,
        )
        naive = len(examples) * run.source.shape.layers * (run.units.total + 1)
        return Calibration(scores, evaluator.cache.seconds + contest.seconds, naive)


def _say_cost(run: CalibrationRun, task: CalibrationTask) -> None:
    """Say how many passes of the model choosing may take, beside what each unit would by itself."""
    examples, shape, units = run.examples.scored, run.source.shape, run.units
    spans = [token_spans(example, run.mask, kinds=shape.kinds) for example in examples]
    passes = task.cost(spans, run.mask, units) / (shape.layers * len(examples))
    one_by_one = f"every {'KV head' if units.of_heads else 'layer'} by itself"
    run.say(
        f"choosing takes about {passes:.1f} passes of the model over each of {len(examples)} "
        f"examples, or less; measuring {one_by_one} takes {units.total + 1}"
    )


def _drawn(examples: Examples, compared: bool) -> dict[str, Drawn]:
    scored, validation, _ = examples.asked
    drawn = {"scored": Drawn(scored, len(examples.scored))}
    if compared:
        drawn["validation"] = Drawn(validation, len(examples.validation))
    return drawn


def expected_cost(
    run: CalibrationRun, selector: Selector, examples: Sequence[Example], keep: int
) -> float:
    """What choosing `keep` of a model's units may cost on examples, in layer-forwards."""
    asked = asked_of(selector, run.units, keep)
    mine = examples[: selector.most_examples]
    spans = (token_spans(example, run.mask, kinds=run.source.shape.kinds) for example in mine)
    return fsum(selector.cost(each, run.mask, *asked) for each in spans)


def _choose(
    run: CalibrationRun,
    evaluator: PlanEvaluator,
    selector: Selector,
    keep: int,
    progress: Progress,
    title: str,
) -> _Found:
    """What a selector chooses, by the numbers that units have in the whole model."""
    expected = expected_cost(run, selector, evaluator.examples, keep)
    units, count = asked_of(selector, run.units, keep)
    with evaluator.tallying(title, expected, progress) as tally:
        choice = selector.choose(evaluator.telling(units), count)
    if units != run.units:
        choice = choice.spread(run.units)
    return _Found(selector, choice.among(run.numbers), tally.layer_forwards)


def _contest(
    run: CalibrationRun, task: CalibrationTask, found: Mapping[str, _Found], progress: Progress
) -> Contest:
    """Run what was chosen, and periodic plans, on examples that nothing was chosen on."""
    candidates = [Candidate("original", run.numbers)]
    for name, one in found.items():
        units, count = asked_of(one.selector, run.units, task.keep)
        kept = one.choice.order[: count * run.units.per_layer // units.per_layer]
        candidates.append(Candidate(name, kept))
    candidates += periodic_candidates(run, task.keep)
    limit = task.contest_passes * run.source.shape.layers * len(run.examples.scored)
    return hold_contest(run, candidates, limit, progress)


def _comparison(
    task: CalibrationTask, found: Mapping[str, _Found], outcomes: Sequence[Outcome]
) -> MethodComparison:
    """How the original and every choice did, and what each choice would have cost by itself."""
    original, *others = outcomes
    costs = {name: one.layer_forwards for name, one in found.items()}
    entries = tuple(
        ComparedPlan(outcome, outcome.loss.mean, costs.get(outcome.name, 0.0)) for outcome in others
    )
    return MethodComparison(task.keep, entries, original)


def _best(
    found: Mapping[str, _Found], comparison: MethodComparison | None
) -> tuple[_Found, tuple[int, ...]]:
    """Whose scores are kept, and the order of the units."""
    if comparison is None:
        # Where there is nothing to choose, any method will do.
        best = list(found.values())[-1]
        return best, best.choice.order
    best = next(found[e.outcome.name] for e in comparison.ranked if e.outcome.name in found)
    # A periodic plan may win; then the rest keeps the order of the best method that measures.
    kept = comparison.entry(comparison.winner).outcome.full
    if comparison.winner in found:
        return best, best.choice.order
    return best, (*kept, *(unit for unit in best.choice.order if unit not in kept))
