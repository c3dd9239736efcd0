"""Plans held against each other on examples that they were not chosen on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from converter.calibration.data.examples import Examples
from converter.calibration.evaluator import open_evaluator
from converter.calibration.results import Outcome, Quality
from converter.calibration.run import CalibrationRun
from converter.calibration.selectors import PERIODIC, periodic_layers, periodic_offsets
from converter.calibration.selectors.search import Smallest, smallest_within
from converter.common.errors import DataError
from converter.common.progress import Progress
from converter.inference.example import Example
from converter.inference.positions import layer_forwards, token_spans
from converter.plan.plan import Plan, layer_types_of

# What the examples are called on which choices are held against each other.
VALIDATION = "validation"
# Those that only tell what a finished choice is worth.
QUALITY = "quality"


class Candidate(NamedTuple):
    """A plan to be run: what chose it, its full-attention layers, and a periodic one's offset."""

    method: str
    layers: tuple[int, ...]
    offset: int | None = None


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
    total, mask = run.source.shape.layers, run.mask
    sets = [frozenset(candidate.layers) for candidate in candidates]
    plans = list(dict.fromkeys(layer_types_of(layers, total) for layers in sets))
    expected = sum(layer_forwards(plans, token_spans(example, mask), mask) for example in examples)
    with (
        open_evaluator(run, examples, split) as evaluator,
        evaluator.tallying(split, expected, progress),
    ):
        answers = evaluator.answers(sets)
    return [
        Outcome(
            candidate.method,
            tuple(sorted(candidate.layers)),
            tuple(answer.nll for answer in mine),
            tuple(answer.correct for answer in mine),
            candidate.offset,
        )
        for candidate, mine in zip(candidates, answers, strict=True)
    ]


def within_bound(
    run: CalibrationRun, order: Sequence[int], bound: float, progress: Progress
) -> Smallest:
    """The fewest layers, from the front of an order, that keep the validation loss low; said, too.

    Args:
        order: every layer, the one to keep first.
        bound: loss above the original's, in nats per answer token.

    Raises:
        ScoresError: the work folder holds results of another measurement.
        DataError: there are no validation examples, or the model's loss is not a finite number.
        OutputError: the work folder cannot be written.
    """
    check_validation(run.examples)
    examples, total = run.examples.validation, len(order)
    # Bisection halves what is left at each step, and plans next to each other share little.
    expected = len(examples) * total * (1 + total.bit_length())
    with (
        open_evaluator(run, examples, VALIDATION) as evaluator,
        evaluator.tallying("loss bound", expected, progress),
    ):
        smallest = smallest_within(evaluator.losses, order, bound)
    full = smallest.full.loss
    losses = ", ".join(f"{len(one.layers)}: {one.loss - full:+.3f}" for one in smallest.measured)
    run.say(
        f"{len(smallest.found.layers)} full layers keep within {bound} nats of the original on "
        f"{len(examples)} examples (loss above it by full layers: {losses})"
    )
    return smallest


def measure_quality(run: CalibrationRun, plan: Plan, progress: Progress) -> Quality:
    """Run the original, the plan and what it must beat on the held-out examples.

    That is all layers sliding, and the periodic plans of as many full layers.

    Raises:
        DataError: there are no held-out examples, or the loss is not a finite number.
    """
    total, kept = len(plan.layer_types), plan.full_attention_layers
    held_out = run.examples.held_out
    check_held_out(held_out)
    candidates = [
        Candidate("original", tuple(range(total))),
        Candidate("hybrid", kept),
        Candidate("all sliding", ()),
        *periodic_candidates(total, len(kept)),
    ]
    original, hybrid, *others = evaluate_plans(run, held_out, QUALITY, candidates, progress)
    return Quality(original, hybrid, tuple(others))


def periodic_candidates(total: int, count: int) -> list[Candidate]:
    """The periodic plans of so many full layers at every offset."""
    if not 0 < count < total:
        return []
    return [
        Candidate(PERIODIC.name, periodic_layers(total, count, offset), offset)
        for offset in range(periodic_offsets(total, count))
    ]
