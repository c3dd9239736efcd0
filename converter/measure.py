"""Measuring: scores of layers, and the quality of plans, resumable after every example."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from converter.data import Example, Examples, fingerprint_of
from converter.errors import DataError
from converter.files import is_empty_folder
from converter.forward.rows import Extent, extent_of, layer_forwards
from converter.mask import FULL, Mask
from converter.model import Placement
from converter.notebook import Notebook, Record, open_notebook
from converter.plan import Plan, layer_types_of
from converter.processes import Processes
from converter.quality import Outcome, Quality
from converter.race import Race, after_round, round_ends, screened_race
from converter.scores import Scores
from converter.selectors import (
    MEASURED,
    ExampleScores,
    MeasuredSelector,
    periodic_layers,
    periodic_offsets,
)
from converter.source import Source

if TYPE_CHECKING:
    from converter.forward.memory import Held, Schedule
    from converter.forward.meter import Advance, Meter

_JOURNALS = ("scores*.jsonl", "quality*.jsonl", "controls*.jsonl", "sensitivity*.jsonl")
_SPILL = "hidden-states"
_SCREEN = "first-order"


class Bar(Protocol):
    """Shows how far a piece of work is."""

    def advance(self, amount: float) -> None:
        """So much has been done."""

    def expect(self, amount: float) -> None:
        """So much is still to do."""


# Opens a bar for a title and an amount of work; see `converter.console.progress`.
Progress = Callable[[str, float], AbstractContextManager[Bar]]


@dataclass(frozen=True)
class Effort:
    """How much of a measurement is worth its time.

    Attributes:
        keep: how many layers will be chosen; None scores every layer on every example.
        screen: let a first-order score leave only layers near the boundary to be raced.
    """

    keep: int | None = None
    screen: bool = False


@dataclass(frozen=True)
class Measurement:
    """What a measurement is made of; equal measurements give equal results.

    Attributes:
        source: the model.
        examples: what it is measured on.
        mask: what sliding layers see.
        placement: device and dtype.
        memory_bytes: what the process may take; None for as much as the model wants.
        work: folder for what must survive a kill.
        fresh: forget what an earlier run left there.
        processes: those that share the work.
        say: is told what was decided on the way.
        near_examples: makes the scored examples again with their evidence inside the window, by
            their place among the scored ones; none where that cannot be.
    """

    source: Source
    examples: Examples
    mask: Mask
    placement: Placement
    memory_bytes: int | None
    work: Path
    fresh: bool
    processes: Processes
    say: Callable[[str], None]
    near_examples: Callable[[], Mapping[int, Example]]

    @cached_property
    def _meters(self) -> dict[bool, tuple[Meter, int]]:
        return {}

    def schedule(self, gradient: bool) -> Schedule:
        """How the model is run on these examples within the memory allowed.

        Args:
            gradient: whether gradients are wanted, which take more memory.

        Raises:
            UsageError: it cannot be, in so little.
        """
        from converter.forward.memory import RESIDENT, choose_schedule

        if self.memory_bytes is None:
            return RESIDENT
        examples = (*self.examples.scored, *self.examples.held_out)
        longest = max(examples, key=lambda e: len(e.prompt) + len(e.answer))
        extent = extent_of(longest, self.mask)
        return choose_schedule(
            self.source,
            self.placement.dtype,
            len(self.examples.scored),
            extent,
            self._held(gradient, extent),
            self.memory_bytes,
        )

    def meter(self, gradient: bool) -> tuple[Meter, int]:
        """The loaded model, and how many examples to give it at a time.

        Loaded when it is first needed; one that fits into memory serves everything.

        Args:
            gradient: whether gradients are wanted.
        """
        from converter.forward.load import load_meter

        known = self._meters.get(gradient)
        if known is not None:
            return known
        schedule = self.schedule(gradient)
        if self.memory_bytes is not None:
            self.say(f"memory: {schedule.why}")
        self._meters.clear()
        meter = load_meter(self.source, self.mask, self.placement, schedule, self._spill_folder())
        self._meters[gradient] = meter, schedule.group
        if not schedule.streamed:
            self._meters[not gradient] = self._meters[gradient]
        return meter, schedule.group

    def _spill_folder(self) -> Path:
        """Where hidden states wait: those of another model, mask or process are not ours."""
        whose = [self.fingerprint("hidden states", ()), self.processes.rank]
        return self.work / _SPILL / hashlib.sha256(json.dumps(whose).encode()).hexdigest()[:16]

    def _held(self, gradient: bool, extent: Extent) -> Held:
        from converter.forward.memory import held_by_gradient, held_by_plans
        from converter.selectors.switching import plans_of

        layers = self.source.shape.layers
        if gradient:
            return held_by_gradient(layers, extent)
        return held_by_plans(plans_of(FULL, range(layers), layers), extent, self.mask)

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


@dataclass(frozen=True)
class Job:
    """Something to find out about examples.

    Attributes:
        pieces: the examples, by the name of the record that each will have.
        find: makes the records of some examples.
        cost: of one example, in layer-forwards.
        gradient: whether `find` takes gradients.
    """

    pieces: Mapping[str, Example]
    find: Callable[[Meter, Sequence[Example], Advance], Sequence[Record]]
    cost: Callable[[Example], float]
    gradient: bool = False

    def cost_left(self, notebook: Notebook) -> float:
        """What this process still has to do of it."""
        missing = notebook.missing(list(self.pieces))
        return math.fsum(self.cost(self.pieces[name]) for name in missing)

    def run(self, measurement: Measurement, notebook: Notebook, bar: Bar) -> list[Record]:
        """The records of all pieces; what is known already is not found again."""
        missing = [self.pieces[name] for name in notebook.missing(list(self.pieces))]
        group, find = 1, _nothing
        if missing:
            meter, group = measurement.meter(self.gradient)

            def find(names: Sequence[str]) -> Sequence[Record]:
                return self.find(meter, [self.pieces[name] for name in names], bar.advance)

        return notebook.fill(list(self.pieces), group, find)


def _nothing(names: Sequence[str]) -> Sequence[Record]:
    """Stands in where this process has nothing left to find."""
    assert not names  # noqa: S101
    return ()


def run_alone(
    measurement: Measurement,
    title: str,
    fingerprint: Mapping[str, Any],
    job: Job,
    progress: Progress,
) -> list[Record]:
    """Run one job in a notebook of its own.

    Raises:
        ScoresError: the work folder holds results of another measurement.
        OutputError: the work folder cannot be written.
    """
    with (
        open_notebook(
            measurement.work, title, fingerprint, measurement.processes, fresh=measurement.fresh
        ) as notebook,
        progress(title, job.cost_left(notebook)) as bar,
    ):
        return job.run(measurement, notebook, bar)


@dataclass(frozen=True)
class Calibration:
    """Scores, and the time it took to measure them, on all processes together."""

    scores: Scores
    seconds: float


def calibrate(
    measurement: Measurement, method: str, effort: Effort, progress: Progress
) -> Calibration:
    """Score layers on the examples.

    Raises:
        ScoresError: the work folder holds results of another measurement.
        DataError: the model's loss is not a finite number.
        OutputError: the work folder cannot be written.
    """
    selector = MEASURED[method]
    keep = effort.keep if selector.single else None
    if keep in (0, measurement.source.shape.layers):
        keep = None
    fingerprint = measurement.fingerprint(method, measurement.examples.scored) | {
        "race": None if keep is None else {"keep": keep, "screen": effort.screen}
    }
    with open_notebook(
        measurement.work, "scores", fingerprint, measurement.processes, fresh=measurement.fresh
    ) as notebook:
        if notebook.found_earlier:
            measurement.say(f"resuming: {notebook.found_earlier} pieces were found earlier")
        scoring = _Scoring(measurement, notebook, progress)
        if keep is None:
            examples, race = scoring.all_layers(selector), None
        else:
            examples, race = scoring.race(selector, keep, screen=effort.screen)
        scores = Scores(
            method=method,
            mask=measurement.mask,
            examples=tuple(examples),
            layer_forwards=math.fsum(scoring.layer_forwards),
            fingerprint=fingerprint,
            race=race,
        )
        return Calibration(scores, notebook.seconds)


class _Scoring:
    """The scoring of one measurement.

    Attributes:
        layer_forwards: what each record cost.
    """

    def __init__(self, measurement: Measurement, notebook: Notebook, progress: Progress) -> None:
        self._measurement = measurement
        self._notebook = notebook
        self._progress = progress
        self._examples = measurement.examples.scored
        self._total = measurement.source.shape.layers
        self.layer_forwards: list[float] = []

    def all_layers(self, selector: MeasuredSelector) -> list[ExampleScores]:
        """Every layer on every example."""
        job = self._job(selector, "score", range(len(self._examples)), range(self._total))
        with self._progress("scores", job.cost_left(self._notebook)) as bar:
            return self._run(job, bar)

    def race(
        self, selector: MeasuredSelector, keep: int, *, screen: bool
    ) -> tuple[list[ExampleScores], Race]:
        """Layers until it is clear on which side of the boundary they are."""
        race, known = Race(keep), list[ExampleScores]()
        places = range(len(self._examples))
        if screen:
            everything = range(self._total)
            job = self._job(MEASURED[_SCREEN], "screen", places, everything)
            with self._progress("screening", job.cost_left(self._notebook)) as bar:
                known = self._run(job, bar)
            race = screened_race(_sums(known, everything), keep)
            known = [_only(example, race.screened) for example in known]
        ends = round_ends(len(places))
        raced: list[ExampleScores] = []
        with self._progress("scores", 0) as bar:
            for begin, end in zip((0, *ends), ends, strict=False):
                layers = race.open_layers(self._total)
                if not layers:
                    break
                # At most: some layers will be decided before the last round.
                left = self._job(selector, "score", places[begin:], layers)
                bar.expect(left.cost_left(self._notebook))
                raced += self._run(self._job(selector, "score", places[begin:end], layers), bar)
                by_layer = {i: [e.scores[i] or 0.0 for e in raced] for i in layers}
                race = after_round(race, by_layer, len(ends), end - begin)
        return _merged(known, raced), race

    def _job(
        self,
        selector: MeasuredSelector,
        stage: str,
        places: Sequence[int],
        layers: Sequence[int],
    ) -> Job:
        """Score layers on the examples at some places."""
        mask, total = self._measurement.mask, self._total

        def cost(example: Example) -> float:
            return selector.cost(extent_of(example, mask), mask, total, layers)

        def find(meter: Meter, examples: Sequence[Example], advance: Advance) -> Sequence[Record]:
            measured = selector.measure(meter, examples, layers, advance)
            return [
                {"scores": asdict(_finite(scores)), "layer_forwards": cost(example)}
                for example, scores in zip(examples, measured, strict=True)
            ]

        pieces = {f"{stage} {place}": self._examples[place] for place in places}
        return Job(pieces, find, cost, gradient=not selector.single)

    def _run(self, job: Job, bar: Bar) -> list[ExampleScores]:
        records = job.run(self._measurement, self._notebook, bar)
        self.layer_forwards += [record["layer_forwards"] for record in records]
        return [ExampleScores.from_json(record["scores"]) for record in records]


def _sums(examples: Sequence[ExampleScores], layers: Sequence[int]) -> list[float]:
    return [math.fsum(e.scores[layer] or 0.0 for e in examples) for layer in layers]


def _only(example: ExampleScores, layers: Sequence[int]) -> ExampleScores:
    """An example with the scores of some layers only."""
    scores = tuple(s if i in layers else None for i, s in enumerate(example.scores))
    return ExampleScores(**{**vars(example), "scores": scores})


def _merged(
    screened: Sequence[ExampleScores], raced: Sequence[ExampleScores]
) -> list[ExampleScores]:
    """Examples with what the screening and the race said of each; the race saw the first ones."""
    if not screened:
        return list(raced)
    together = []
    for place, first in enumerate(screened):
        if place < len(raced):
            second = raced[place]
            scores = tuple(
                b if a is None else a for a, b in zip(first.scores, second.scores, strict=True)
            )
            together.append(ExampleScores(**{**vars(second), "scores": scores}))
        else:
            together.append(first)
    return together


def _finite(scores: ExampleScores) -> ExampleScores:
    numbers = (scores.full, scores.sliding, *scores.scores)
    for number in numbers:
        if number is not None:
            _check_finite(number)
    return scores


def _check_finite(nll: float) -> float:
    if not math.isfinite(nll):
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
    held_out = measurement.examples.held_out
    if not held_out:
        raise DataError("there are no held-out examples to measure quality on")
    candidates = _candidates(plan)
    total = len(plan.layer_types)
    plans = [layer_types_of(layers, total) for layers in candidates.values()]
    fingerprint = measurement.fingerprint("quality", held_out) | {
        "layer_types": list(plan.layer_types)
    }

    def find(meter: Meter, examples: Sequence[Example], advance: Advance) -> Sequence[Record]:
        return [
            {
                "nll": [_check_finite(answer.nll) for answer in answers],
                "correct": [answer.correct for answer in answers],
            }
            for answers in meter.answers(examples, plans, advance)
        ]

    job = Job(
        {f"held out {place}": example for place, example in enumerate(held_out)},
        find,
        lambda example: layer_forwards(plans, extent_of(example, plan.mask), plan.mask),
    )
    # One notebook for each plan: another budget on the same scores starts another.
    title = "-".join(["quality", *map(str, plan.full_attention_layers)])
    records = run_alone(measurement, title, fingerprint, job, progress)
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
    shutil.rmtree(folder / _SPILL, ignore_errors=True)
    if is_empty_folder(folder):
        folder.rmdir()
