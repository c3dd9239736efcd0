"""Plans held against each other on examples that they were not chosen on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from converter.data import Example
from converter.errors import DataError
from converter.forward.rows import extent_of, layer_forwards
from converter.measure import Measurement, Progress
from converter.notebook import open_notebook
from converter.plan import Plan, layer_types_of
from converter.quality import Outcome, Quality
from converter.selectors import periodic_layers, periodic_offsets
from converter.study import Study


def outcomes(
    measurement: Measurement,
    examples: Sequence[Example],
    lot: str,
    candidates: Mapping[str, tuple[int, ...]],
    progress: Progress,
) -> list[Outcome]:
    """Run plans on examples.

    Args:
        measurement: the model.
        examples: what is read.
        lot: what the examples are called in the work folder; a plan that was run on them in an
            earlier call is not run again.
        candidates: full-attention layers of the plans, by name.
        progress: shows how far it is.

    Raises:
        ScoresError: the work folder holds results of another measurement.
        DataError: the model's loss is not a finite number.
        OutputError: the work folder cannot be written.
    """
    total, mask = measurement.source.shape.layers, measurement.mask
    sets = [frozenset(layers) for layers in candidates.values()]
    plans = list(dict.fromkeys(layer_types_of(layers, total) for layers in sets))
    expected = sum(layer_forwards(plans, extent_of(example, mask), mask) for example in examples)
    with (
        open_notebook(
            measurement.work,
            lot,
            measurement.fingerprint(examples),
            measurement.processes,
            fresh=measurement.fresh,
        ) as notebook,
        (study := Study(measurement, notebook, examples, lot)).accounting(lot, expected, progress),
    ):
        answers = study.answers(sets)
    return [
        Outcome(
            name,
            tuple(sorted(layers)),
            tuple(answer.nll for answer in mine),
            tuple(answer.correct for answer in mine),
        )
        for (name, layers), mine in zip(candidates.items(), answers, strict=True)
    ]


def measure_quality(measurement: Measurement, plan: Plan, progress: Progress) -> Quality:
    """Run the original, the plan and what it must beat on the held-out examples.

    The comparison is with all layers sliding and with the periodic plan of the same number of
    full-attention layers at every offset.

    Raises:
        DataError: there are no held-out examples, or the loss is not a finite number.
    """
    total, kept = len(plan.layer_types), plan.full_attention_layers
    held_out = measurement.examples.held_out
    if not held_out:
        raise DataError("there are no held-out examples to measure quality on")
    candidates = {"original": tuple(range(total)), "hybrid": kept, "all sliding": ()}
    candidates |= periodic_candidates(total, len(kept))
    original, hybrid, *others = outcomes(measurement, held_out, "quality", candidates, progress)
    return Quality(original, hybrid, tuple(others))


def periodic_candidates(total: int, count: int) -> dict[str, tuple[int, ...]]:
    """The periodic plans of so many full layers at every offset, by name."""
    if not 0 < count < total:
        return {}
    return {
        f"periodic, offset {offset}": periodic_layers(total, count, offset)
        for offset in range(periodic_offsets(total, count))
    }
