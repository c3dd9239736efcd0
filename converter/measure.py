"""Measuring: scores of layers, and the quality of plans, resumable after every example."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from converter.data import Example, Examples, fingerprint_of
from converter.errors import DataError
from converter.files import is_empty_folder
from converter.journal import open_journal
from converter.mask import Mask
from converter.model import AnswerMeter, Placement, load_meter
from converter.plan import Plan
from converter.quality import Outcome, Quality
from converter.scores import ExampleNll, Scores
from converter.selectors import MEASURED, MeasuredSelector, periodic_layers, periodic_offsets
from converter.source import Source

_JOURNALS = ("scores.jsonl", "quality*.jsonl")

# Yields the items it is given, showing how far they are; see `converter.console.progress`.
Progress = Callable[[Sequence[Any], str, int], Iterator[Any]]


@dataclass(frozen=True)
class Measurement:
    """What a measurement is made of; equal measurements give equal results.

    Attributes:
        source: the model.
        examples: what it is measured on.
        mask: what sliding layers see.
        placement: device and dtype.
        work: folder for what must survive a kill.
        fresh: forget what an earlier run left there.
    """

    source: Source
    examples: Examples
    mask: Mask
    placement: Placement
    work: Path
    fresh: bool

    @cached_property
    def meter(self) -> AnswerMeter:
        """The loaded model; loaded when the first forward pass needs it."""
        return load_meter(self.source, self.mask, self.placement)

    def fingerprint(self, method: str, examples: Sequence[Example]) -> dict[str, Any]:
        """Everything that results depend on, by name."""
        return {
            "source": self.source.fingerprint,
            "data": fingerprint_of(examples),
            "mask": self.mask.to_json(),
            "method": method,
            "dtype": self.placement.dtype,
            "device": self.placement.device.split(":")[0],
            "torch": version("torch"),
            "transformers": version("transformers"),
        }


def calibrate(measurement: Measurement, method: str, progress: Progress) -> Scores:
    """Score every layer on every example.

    Raises:
        ScoresError: the work folder holds results of another measurement.
        DataError: the model's loss is not a finite number.
        OutputError: the work folder cannot be written.
    """
    selector = MEASURED[method]
    fingerprint = measurement.fingerprint(method, measurement.examples.scored)
    layers = measurement.source.shape.layers

    def piece(meter: AnswerMeter, example: Example) -> dict[str, Any]:
        return asdict(_score_example(meter, example, selector, layers))

    records = _resumable(
        measurement, "scores", fingerprint, measurement.examples.scored, piece, progress
    )
    # Both uniform models and one forward pass for each switched layer.
    forwards = len(records) * (layers + 2)
    return Scores(
        method=method,
        mask=measurement.mask,
        examples=tuple(ExampleNll.from_json(record) for record in records),
        layer_forwards=forwards * layers,
        fingerprint=fingerprint,
    )


def _score_example(
    meter: AnswerMeter, example: Example, selector: MeasuredSelector, layers: int
) -> ExampleNll:
    started = time.perf_counter()
    full, sliding = (meter.measure(example, kept)[0] for kept in (range(layers), ()))
    switched = tuple(
        meter.measure(example, selector.variant(layer, layers))[0] for layer in range(layers)
    )
    return ExampleNll(
        kind=example.kind,
        prompt_tokens=len(example.prompt),
        answer_tokens=len(example.answer),
        full=_finite(full),
        sliding=_finite(sliding),
        switched=tuple(map(_finite, switched)),
        seconds=time.perf_counter() - started,
    )


def _finite(nll: float) -> float:
    if nll != nll or nll == float("inf"):
        raise DataError(
            "the model's loss is not a finite number",
            got=nll,
            next_step="try --dtype float32 or bfloat16; if it stays, the weights are damaged",
        )
    return nll


def measure_quality(measurement: Measurement, plan: Plan, progress: Progress) -> Quality:
    """Run the original, the plan and what it must beat on the held-out examples.

    The comparison is with all layers sliding and with the periodic plan of the same number of
    full-attention layers at every offset.

    Raises:
        DataError: there are no held-out examples, or the loss is not a finite number.
    """
    if not measurement.examples.held_out:
        raise DataError("there are no held-out examples to measure quality on")
    candidates = _candidates(plan)

    def piece(meter: AnswerMeter, example: Example) -> dict[str, Any]:
        results = [meter.measure(example, layers) for layers in candidates.values()]
        return {
            "nll": [_finite(nll) for nll, _ in results],
            "correct": [right for _, right in results],
        }

    fingerprint = measurement.fingerprint("quality", measurement.examples.held_out) | {
        "layer_types": list(plan.layer_types)
    }
    # One journal for each plan: another budget on the same scores starts another.
    name = "-".join(["quality", *map(str, plan.full_attention_layers)])
    records = _resumable(
        measurement, name, fingerprint, measurement.examples.held_out, piece, progress
    )
    original, hybrid, *others = (
        Outcome(
            name,
            layers,
            tuple(record["nll"][i] for record in records),
            tuple(record["correct"][i] for record in records),
        )
        for i, (name, layers) in enumerate(candidates.items())
    )
    return Quality(original, hybrid, tuple(others))


def _candidates(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Full-attention layers of the plans to compare, by name; the original and the plan first."""
    total, kept = len(plan.layer_types), plan.full_attention_layers
    candidates = {"original": tuple(range(total)), "hybrid": kept, "all sliding": ()}
    if 0 < len(kept) < total:
        for offset in range(periodic_offsets(total, len(kept))):
            candidates[f"periodic, offset {offset}"] = periodic_layers(total, len(kept), offset)
    return candidates


def clear_work(folder: Path) -> None:
    """Remove what finished work kept in its folder, and the folder when nothing else is in it."""
    for pattern in _JOURNALS:
        for path in [*folder.glob(pattern), *folder.glob(f"{pattern}.lock")]:
            path.unlink()
    if is_empty_folder(folder):
        folder.rmdir()


def _resumable(
    measurement: Measurement,
    name: str,
    fingerprint: Mapping[str, Any],
    examples: Sequence[Example],
    piece: Callable[[AnswerMeter, Example], dict[str, Any]],
    progress: Progress,
) -> list[Mapping[str, Any]]:
    """Run `piece` on every example that no earlier run finished; the results in order."""
    path = measurement.work / f"{name}.jsonl"
    with open_journal(path, fingerprint, fresh=measurement.fresh) as journal:
        records = list(journal.records)[: len(examples)]
        remaining = examples[len(records) :]
        if not remaining:
            return records
        for example in progress(remaining, name, len(records)):
            record = piece(measurement.meter, example)
            journal.append(record)
            records.append(record)
    return records
