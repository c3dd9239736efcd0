"""Plans held against each other on examples that they were not chosen on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import fsum
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from converter.calibration.data.examples import Examples
from converter.calibration.evaluator import open_evaluator
from converter.calibration.results import Outcome
from converter.calibration.run import CalibrationRun
from converter.calibration.selectors import PERIODIC, periodic_among, periodic_offsets
from converter.calibration.selectors.racing import RACE_ERROR, clearly_positive, round_ends
from converter.calibration.selectors.search import Smallest, smallest_within
from converter.common.errors import DataError
from converter.common.progress import Progress
from converter.inference.example import Example
from converter.inference.positions import layer_forwards, token_spans

if TYPE_CHECKING:
    from converter.inference.runner import Answer

# What the examples are called on which choices are held against each other.
VALIDATION = "validation"
# Those that only tell what a finished choice is worth.
QUALITY = "quality"
# A loss bound is read from so many, the first ones, as every step of bisection runs them all.
BOUND_EXAMPLES = 64
# What finding the number of layers that a loss allows is called.
LOSS_BOUND = "loss bound"


class Candidate(NamedTuple):
    """A plan to be run: what chose it, its full-attention units, and a periodic one's offset."""

    method: str
    full: tuple[int, ...]
    offset: int | None = None


class Contest(NamedTuple):
    """Plans held against each other, in their order, and what that took."""

    outcomes: list[Outcome]
    layer_forwards: float
    seconds: float


def check_validation(examples: Examples) -> None:
    """Raise DataError where no example is left that nothing was chosen on."""
    if not examples.validation:
        raise DataError(
            "no example is left to hold choices against each other on",
            where="--validation",
            got=f"all {len(examples.scored)} usable examples are scored",
            next_step="lower --samples, give more data, or name a single --method and a number "
            "of layers",
        )


def check_held_out(examples: Sequence[Example]) -> None:
    """Raise DataError where there are no held-out examples to measure quality on."""
    if not examples:
        raise DataError("there are no held-out examples to measure quality on", where="--holdout")


def evaluate_plans(
    run: CalibrationRun,
    examples: Sequence[Example],
    split: str,
    candidates: Sequence[Candidate],
    progress: Progress,
) -> list[Outcome]:
    """Run plans on examples.

    Args:
        split: what the examples are called in the work folder; a plan that was run on them in an
            earlier call is not run again.

    Raises:
        ScoresError: the work folder holds results of another measurement.
        DataError: the model's loss is not a finite number.
        OutputError: the work folder cannot be written.
    """
    sets = [places(run, candidate.full) for candidate in candidates]
    with (
        open_evaluator(run, examples, split) as evaluator,
        evaluator.tallying(split, plans_cost(run, sets, examples), progress),
    ):
        answers = evaluator.answers(sets)
    return [_outcome(run, *both) for both in zip(candidates, answers, strict=True)]


def plans_cost(
    run: CalibrationRun, sets: Iterable[frozenset[int]], examples: Sequence[Example]
) -> float:
    """What running plans together on examples costs, in layer-forwards.

    The sets are of places among the units that a plan is about, as the evaluator has them.
    """
    shape, mask = run.source.shape, run.mask
    plans = [run.units.types(places) for places in dict.fromkeys(sets)]
    spans = (token_spans(one, mask, kinds=shape.kinds) for one in examples)
    return fsum(layer_forwards(plans, each, mask) for each in spans)


def places(run: CalibrationRun, full: Iterable[int]) -> frozenset[int]:
    """Where units of the model stand among those that a plan is about."""
    place = {number: place for place, number in enumerate(run.numbers)}
    return frozenset(place[number] for number in full)


def _outcome(run: CalibrationRun, candidate: Candidate, answers: Sequence[Answer]) -> Outcome:
    return Outcome(
        candidate.method,
        tuple(sorted(candidate.full)),
        tuple(answer.nll for answer in answers),
        tuple(answer.correct for answer in answers),
        candidate.offset,
        run.units.per_layer,
    )


def hold_contest(
    run: CalibrationRun, candidates: Sequence[Candidate], limit: float, progress: Progress
) -> Contest:
    """Run plans on ever more validation examples, those that may still be the best.

    A plan that is clearly worse than the best one is run no further. While what is left is not
    clear, twice as many examples are looked at, by as many of the best plans as the limit allows.

    Args:
        candidates: the first one is run as long as any.
        limit: what it may cost, in layer-forwards; the first round is always held.

    Raises:
        ScoresError: the work folder holds results of another measurement.
        DataError: the model's loss is not a finite number.
        OutputError: the work folder cannot be written.
    """
    examples = run.examples.validation
    ends = round_ends(len(examples))
    sets = [places(run, candidate.full) for candidate in candidates]
    always, *others = dict.fromkeys(sets)
    left = others
    answers: dict[frozenset[int], list[Answer]] = {}
    with (
        open_evaluator(run, examples, VALIDATION) as evaluator,
        evaluator.tallying(VALIDATION, limit, progress),
    ):
        for begin, end in zip((0, *ends), ends, strict=False):
            room = limit - evaluator.layer_forwards_asked
            while begin and len(left) > 1:
                if plans_cost(run, [always, *left], examples[begin:end]) <= room:
                    break
                left = left[:-1]
            if begin and len(left) < 2:
                break
            found = evaluator.answers([always, *left], end=end)
            answers |= dict(zip([always, *left], found, strict=True))
            left = _undecided({one: [a.nll for a in answers[one]] for one in left}, len(ends))
    outcomes = [_outcome(run, one, answers[its]) for one, its in zip(candidates, sets, strict=True)]
    return Contest(outcomes, evaluator.layer_forwards_asked, evaluator.cache.seconds)


def _undecided(
    losses: Mapping[frozenset[int], Sequence[float]], rounds: int
) -> list[frozenset[int]]:
    """The plans that are not clearly worse than the best one, the best first."""
    order = sorted(losses, key=lambda layers: fsum(losses[layers]))
    best = losses[order[0]]
    # The error is shared by all comparisons.
    level = 1 - RACE_ERROR / (rounds * max(1, len(order) - 1))
    return [
        layers
        for layers in order
        if not clearly_positive([a - b for a, b in zip(losses[layers], best, strict=True)], level)
    ]


def within_bound(
    run: CalibrationRun, order: Sequence[int], bound: float, progress: Progress
) -> Smallest:
    """The fewest units, from the front of an order, that keep the validation loss low; said, too.

    Args:
        order: every layer or KV head, the one to keep first.
        bound: loss above the original's, in nats per answer token.

    Raises:
        ScoresError: the work folder holds results of another measurement.
        DataError: there are no validation examples, or the model's loss is not a finite number.
        OutputError: the work folder cannot be written.
    """
    check_validation(run.examples)
    examples, units = run.examples.validation, run.units
    count = min(BOUND_EXAMPLES, len(examples))
    # Bisection halves what is left at each step, and plans next to each other share little.
    expected = count * run.source.shape.layers * (1 + units.total.bit_length())
    with (
        open_evaluator(run, examples, VALIDATION) as evaluator,
        evaluator.tallying(LOSS_BOUND, expected, progress),
    ):
        smallest = smallest_within(
            lambda sets: [
                fmean(answer.nll for answer in answers)
                for answers in evaluator.answers(sets, end=count)
            ],
            [run.numbers.index(unit) for unit in order],
            bound,
        )
    full = smallest.full.loss
    losses = ", ".join(f"{len(one.layers)}: {one.loss - full:+.3f}" for one in smallest.measured)
    run.say(
        f"{len(smallest.found.layers)} full {units} keep within {bound} nats of the original on "
        f"{count} examples (loss above it by full {units}: {losses})"
    )
    return smallest


def periodic_candidates(run: CalibrationRun, keep: int) -> list[Candidate]:
    """The periodic plans of so many full units, or as many whole layers, at every offset."""
    layers, count = run.source.shape.full_layers, keep // run.units.per_layer
    if not 0 < count < len(layers):
        return []
    return [
        Candidate(PERIODIC.name, run.units.of_layers(periodic_among(layers, count, offset)), offset)
        for offset in range(periodic_offsets(len(layers), count))
    ]
