"""Measuring: a model, examples, and how the one is run on the others, resumable after each."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from converter.calibration.cache import Notebook, Record, open_notebook
from converter.calibration.data.sources import Example, Examples, fingerprint_of
from converter.calibration.distributed import Processes
from converter.common.files import is_empty_folder
from converter.inference.load import Placement
from converter.inference.positions import Extent, extent_of
from converter.model.mask import FULL, Mask
from converter.model.source import Source

if TYPE_CHECKING:
    from converter.inference.memory import Held, Schedule
    from converter.inference.runner import Advance, Meter

_JOURNALS = tuple(
    f"{title}*.jsonl" for title in ("scores", "validation", "quality", "controls", "sensitivity")
)
_SPILL = "hidden-states"
_SCREEN = "first-order"


class Bar(Protocol):
    """Shows how far a piece of work is."""

    def advance(self, amount: float) -> None:
        """So much has been done."""

    def expect(self, amount: float) -> None:
        """So much is still to do."""


# Opens a bar for a title and an amount of work; see `converter.cli.console.progress`.
Progress = Callable[[str, float], AbstractContextManager[Bar]]


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
        from converter.inference.memory import RESIDENT, choose_schedule

        if self.memory_bytes is None:
            return RESIDENT
        longest = max(self.examples.all, key=lambda e: len(e.prompt) + len(e.answer))
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
        from converter.inference.load_runner import load_meter

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
        whose = [self.fingerprint(()), self.processes.rank]
        return self.work / _SPILL / hashlib.sha256(json.dumps(whose).encode()).hexdigest()[:16]

    def _held(self, gradient: bool, extent: Extent) -> Held:
        from converter.calibration.selectors.switching import plans_of
        from converter.inference.memory import held_by_gradient, held_by_plans

        layers = self.source.shape.layers
        if gradient:
            return held_by_gradient(layers, extent)
        return held_by_plans(plans_of(FULL, range(layers), layers), extent, self.mask)

    def fingerprint(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Everything that results depend on, by name."""
        return {
            "source": self.source.fingerprint,
            "data": fingerprint_of(examples),
            "mask": self.mask.to_json(),
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
        heavy: whether `find` takes as much memory as gradients do.
    """

    pieces: Mapping[str, Example]
    find: Callable[[Meter, Sequence[Example], Advance], Sequence[Record]]
    cost: Callable[[Example], float]
    heavy: bool = False

    def cost_left(self, notebook: Notebook) -> float:
        """What this process still has to do of it."""
        missing = notebook.missing(list(self.pieces))
        return math.fsum(self.cost(self.pieces[name]) for name in missing)

    def run(self, measurement: Measurement, notebook: Notebook, bar: Bar) -> list[Record]:
        """The records of all pieces; what is known already is not found again."""
        missing = [self.pieces[name] for name in notebook.missing(list(self.pieces))]
        group, find = 1, _nothing
        if missing:
            meter, group = measurement.meter(self.heavy)

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


def clear_work(folder: Path) -> None:
    """Remove what finished work kept in its folder, and the folder when nothing else is in it."""
    for pattern in _JOURNALS:
        for path in [*folder.glob(pattern), *folder.glob(f"{pattern}.lock")]:
            path.unlink()
    shutil.rmtree(folder / _SPILL, ignore_errors=True)
    if is_empty_folder(folder):
        folder.rmdir()
