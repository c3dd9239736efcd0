"""Measuring: a model, examples, and how the one is run on the others, resumable after each."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.calibration.cache import Record, ResultCache, open_cache
from converter.calibration.data.sources import Examples, fingerprint_of
from converter.calibration.distributed import Processes
from converter.common.files import is_empty_folder
from converter.common.progress import Bar, Progress
from converter.inference.example import Example
from converter.inference.load import Placement
from converter.inference.positions import TokenSpans, token_spans
from converter.model.mask import FULL, Mask
from converter.model.source import Source

if TYPE_CHECKING:
    from converter.inference.memory import ActivationFootprint, MemoryPlan
    from converter.inference.runner import Advance, ModelRunner

_JOURNALS = tuple(
    f"{title}*.jsonl" for title in ("scores", "validation", "quality", "controls", "sensitivity")
)
_SPILL = "hidden-states"
_SCREEN = "first-order"


@dataclass(frozen=True)
class CalibrationRun:
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
    def _runners(self) -> dict[bool, tuple[ModelRunner, int]]:
        return {}

    def memory_plan(self, gradient: bool) -> MemoryPlan:
        """How the model is run on these examples within the memory allowed.

        Args:
            gradient: whether gradients are wanted, which take more memory.

        Raises:
            UsageError: it cannot be, in so little.
        """
        from converter.inference.memory import RESIDENT, plan_memory

        if self.memory_bytes is None:
            return RESIDENT
        longest = max(self.examples.all, key=lambda e: len(e.prompt) + len(e.answer))
        spans = token_spans(longest, self.mask)
        return plan_memory(
            self.source,
            self.placement.dtype,
            len(self.examples.scored),
            spans,
            self._footprint(gradient, spans),
            self.memory_bytes,
        )

    def runner(self, gradient: bool) -> tuple[ModelRunner, int]:
        """The loaded model, and how many examples to give it at a time.

        Loaded when it is first needed; one that fits into memory serves everything.

        Args:
            gradient: whether gradients are wanted.
        """
        from converter.inference.load import load_runner

        known = self._runners.get(gradient)
        if known is not None:
            return known
        memory_plan = self.memory_plan(gradient)
        if self.memory_bytes is not None:
            self.say(f"memory: {memory_plan.why}")
        self._runners.clear()
        runner = load_runner(
            self.source, self.mask, self.placement, memory_plan, self._offload_folder()
        )
        self._runners[gradient] = runner, memory_plan.group
        if not memory_plan.streamed:
            self._runners[not gradient] = self._runners[gradient]
        return runner, memory_plan.group

    def _offload_folder(self) -> Path:
        """Where hidden states wait: those of another model, mask or process are not ours."""
        whose = [self.fingerprint(()), self.processes.rank]
        return self.work / _SPILL / hashlib.sha256(json.dumps(whose).encode()).hexdigest()[:16]

    def _footprint(self, gradient: bool, spans: TokenSpans) -> ActivationFootprint:
        from converter.inference.memory import footprint_of_gradients, footprint_of_plans
        from converter.plan.plan import switched_plans

        layers = self.source.shape.layers
        if gradient:
            return footprint_of_gradients(layers, spans)
        return footprint_of_plans(switched_plans(FULL, range(layers), layers), spans, self.mask)

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
class CachedJob:
    """Something to find out about examples.

    Attributes:
        pieces: the examples, by the name of the record that each will have.
        find: makes the records of some examples.
        cost: of one example, in layer-forwards.
        heavy: whether `find` takes as much memory as gradients do.
    """

    pieces: Mapping[str, Example]
    find: Callable[[ModelRunner, Sequence[Example], Advance], Sequence[Record]]
    cost: Callable[[Example], float]
    needs_gradients: bool = False

    def cost_left(self, cache: ResultCache) -> float:
        """What this process still has to do of it."""
        missing = cache.missing(list(self.pieces))
        return math.fsum(self.cost(self.pieces[name]) for name in missing)

    def run(self, run: CalibrationRun, cache: ResultCache, bar: Bar) -> list[Record]:
        """The records of all pieces; what is known already is not found again."""
        missing = [self.pieces[name] for name in cache.missing(list(self.pieces))]
        group, find = 1, _nothing
        if missing:
            runner, group = run.runner(self.needs_gradients)

            def find(names: Sequence[str]) -> Sequence[Record]:
                return self.find(runner, [self.pieces[name] for name in names], bar.advance)

        return cache.fill(list(self.pieces), group, find)


def _nothing(names: Sequence[str]) -> Sequence[Record]:
    """Stands in where this process has nothing left to find."""
    assert not names  # noqa: S101
    return ()


def run_alone(
    run: CalibrationRun,
    title: str,
    fingerprint: Mapping[str, Any],
    job: CachedJob,
    progress: Progress,
) -> list[Record]:
    """Run one job in a notebook of its own.

    Raises:
        ScoresError: the work folder holds results of another measurement.
        OutputError: the work folder cannot be written.
    """
    with (
        open_cache(run.work, title, fingerprint, run.processes, fresh=run.fresh) as cache,
        progress(title, job.cost_left(cache)) as bar,
    ):
        return job.run(run, cache, bar)


def clear_work(folder: Path) -> None:
    """Remove what finished work kept in its folder, and the folder when nothing else is in it."""
    for pattern in _JOURNALS:
        for path in [*folder.glob(pattern), *folder.glob(f"{pattern}.lock")]:
            path.unlink()
    shutil.rmtree(folder / _SPILL, ignore_errors=True)
    if is_empty_folder(folder):
        folder.rmdir()
