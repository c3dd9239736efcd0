"""A model, examples, and how the one is run on the others, resumable after each."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.calibration.cache import Record
from converter.calibration.data.examples import (
    Examples,
    fingerprint_of,
    load_examples,
    near_examples,
)
from converter.calibration.data.hub import pinned, sets_on_hub
from converter.calibration.data.settings import DataSettings
from converter.calibration.data.sources import KINDS_OF_FILES
from converter.calibration.distributed import ALONE, Processes
from converter.common import devices
from converter.common.devices import SPREAD, Room
from converter.common.errors import UsageError
from converter.common.files import clear_files
from converter.common.progress import Progress, Stage, unseen
from converter.inference import memory
from converter.inference.example import Example
from converter.inference.load import Placement, load_runner, resolve_placement
from converter.inference.memory import MemoryPlan
from converter.inference.tokenizer import load_tokenizer
from converter.model.dimensions import check_token
from converter.model.mask import Mask
from converter.model.source import Source
from converter.plan.units import LAYER, Units, units_of

if TYPE_CHECKING:
    from converter.inference.runner import Advance, ModelRunner

# Makes the records of some examples.
Find = Callable[["ModelRunner", Sequence[Example], "Advance"], Sequence[Record]]

_LOGS = tuple(
    f"{title}*.jsonl" for title in ("scores", "validation", "quality", "controls", "sensitivity")
)
_OFFLOADED = "hidden-states"


@dataclass(frozen=True)
class RunContext:
    """How a run keeps and shows its progress: silently, where nothing else is said.

    Attributes:
        folder: for what must survive a kill.
        fresh: forget what an earlier run left there.
        progress: shows how far a loop is.
        announce: is told which examples will be measured on.
        say: is told what else was decided on the way.
        processes: those that share the work.
        offline: the Hub is not asked for data.
        schedule: is told the stages of the measurement before the first begins.
    """

    folder: Path
    fresh: bool = False
    progress: Progress = unseen
    announce: Callable[[Examples], None] = lambda _: None
    say: Callable[[str], None] = lambda _: None
    processes: Processes = ALONE
    offline: bool = False
    schedule: Callable[[Sequence[Stage]], None] = lambda _: None


@dataclass(frozen=True)
class CalibrationRun:
    """What a measurement is made of; equal measurements give equal results.

    Attributes:
        source: the model.
        examples: what it is measured on.
        mask: what sliding layers see.
        placement: device and dtype.
        memory_bytes: what the process may take of its device; None for what is free there.
        work, fresh, processes, say: as in `RunContext`; `work` is its folder.
        drawn_by: the settings that the examples were drawn by, but for how many of them.
        granularity: whether plans decide layers or KV heads.
        near_examples: makes the scored examples again with their evidence inside the window, by
            their index among the scored ones; none where that cannot be.
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
    drawn_by: Mapping[str, Any] = field(default_factory=dict)
    granularity: str = LAYER

    @cached_property
    def _runners(self) -> dict[bool, tuple[ModelRunner, int]]:
        return {}

    @cached_property
    def _room(self) -> Room:
        """What there was before anything was loaded; processes of one machine share it."""
        sharing = self.processes.on_device(self.placement.device)
        return devices.room_on(self.placement.device, self.memory_bytes, sharing)

    def memory_plan(self, gradient: bool) -> MemoryPlan:
        """How the model is run on these examples within the memory there is.

        Raises:
            UsageError: it cannot be, in so little.
        """
        longest = max(self.examples.all, key=lambda e: len(e.prompt) + len(e.answer))
        workload = memory.Workload(
            source=self.source,
            mask=self.mask,
            dtype=self.placement.dtype,
            examples=len(self.examples.scored),
            prompt_tokens=len(longest.prompt),
            answer_tokens=len(longest.answer),
            gradient=gradient,
        )
        plan = memory.plan_spread if self.placement.device == SPREAD else memory.plan_memory
        return plan(workload, self._room)

    def runner(self, gradient: bool) -> tuple[ModelRunner, int]:
        """The loaded model, and how many examples to give it at a time.

        Loaded when it is first needed; one that fits into memory serves everything.
        """
        if gradient not in self._runners:
            memory_plan = self.memory_plan(gradient)
            if self.memory_bytes is not None or memory_plan.streamed:
                self.say(f"memory: {memory_plan.why}")
            self._runners.clear()
            # Where hidden states wait: those of another model, mask or process are not ours.
            whose = json.dumps([self.settings, self.processes.rank]).encode()
            folder = self.work / _OFFLOADED / hashlib.sha256(whose).hexdigest()[:16]
            runner = load_runner(self.source, self.mask, self.placement, memory_plan, folder)
            self._runners[gradient] = runner, memory_plan.group
            if not memory_plan.streamed and not self.memory_plan(not gradient).streamed:
                self._runners[not gradient] = self._runners[gradient]
        return self._runners[gradient]

    def fingerprint(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Everything that results depend on, by name."""
        sets = sets_on_hub(self.drawn_by.get("data", ""))
        return {
            **self._model,
            "data": fingerprint_of(examples),
            **({"hub_data": sets} if sets else {}),
            "mask": self.mask.to_json(),
        }

    @cached_property
    def units(self) -> Units:
        """What plans decide one by one; raises PlanError as `units_of`."""
        return units_of(self.granularity, self.source.shape)

    @property
    def numbers(self) -> tuple[int, ...]:
        """The units by their numbers in the whole model."""
        return self.units.of_layers(self.source.shape.full_layers)

    @property
    def settings(self) -> dict[str, Any]:
        """What a log of results on single examples must have been made under, by option.

        How many examples there are is none of it: more of them go on from the fewer.
        """
        mask = self.mask
        return {
            **self._model,
            "window": mask.window_tokens,
            "sinks": mask.sink_tokens,
            "full-decode": mask.full_attention_decode,
            **self.drawn_by,
        }

    @property
    def _model(self) -> dict[str, Any]:
        return {
            **self.source.identity,
            "dtype": self.placement.dtype,
            "device": self.placement.device.split(":")[0],
            "torch": version("torch"),
            "transformers": version("transformers"),
        }


def open_run(
    source: Source,
    mask: Mask,
    granularity: str,
    data: DataSettings,
    placement: Placement,
    memory_bytes: int | None,
    context: RunContext,
    *,
    needs_gradients: bool,
) -> CalibrationRun:
    """Gather the examples and all else that a measurement depends on; refuse what cannot work.

    Args:
        source, mask, granularity, placement, memory_bytes: as in `CalibrationRun`.
        data: which examples to take.
        context: where progress is kept and shown.
        needs_gradients: whether gradients will be wanted, which take more memory.

    Raises:
        PlanError: the mask does not fit the model.
        DataError: no usable examples, or none to compare on.
        SourceError: the tokenizer cannot be loaded, or does not belong to the model.
        UsageError: the memory is too little for the model.
    """
    # The weights are hashed while the examples are made.
    _ = source.hashing
    shape, tokenizer = source.shape, load_tokenizer(source.folder)
    # What is measured names the commit.
    data = replace(data, data=pinned(data.data, KINDS_OF_FILES, offline=context.offline))
    examples = load_examples(tokenizer, data, mask, shape.layers, shape.context_tokens)
    largest = max(max(*e.prompt, *e.answer) for e in examples.all)
    check_token(largest, shape.vocabulary, source.folder)
    run = CalibrationRun(
        source=source,
        examples=examples,
        mask=mask,
        granularity=granularity,
        placement=placement,
        memory_bytes=memory_bytes,
        work=context.folder,
        fresh=context.fresh,
        processes=context.processes,
        say=context.say,
        near_examples=partial(near_examples, tokenizer, examples, mask),
        drawn_by=data.drawn_by,
    )
    # Too little memory is said now, not after the first hour.
    for gradient in {False, needs_gradients}:
        run.memory_plan(gradient)
    return run


def placement_for(device: str, dtype: str, processes: Processes, *, streaming: bool) -> Placement:
    """Where this process runs the model; processes of one machine take its GPUs in turn.

    Raises:
        UsageError: the device does not exist here, or cannot be used in this way.
    """
    import torch

    if device == SPREAD and (streaming or processes.count > 1):
        raise UsageError(
            "a model spread over devices is loaded whole, by one process",
            where=f"--device {SPREAD}",
            got="also --memory" if streaming else "torchrun",
        )
    placement = resolve_placement(device, dtype, may_spread=True)
    if placement.device == "cuda" and processes.count > 1:
        own = f"cuda:{processes.local_rank % torch.cuda.device_count()}"
        return replace(placement, device=own)
    return placement


def clear_work(folder: Path) -> None:
    """Remove what finished work kept in its folder, and the folder when nothing else is in it."""
    shutil.rmtree(folder / _OFFLOADED, ignore_errors=True)
    clear_files(folder, _LOGS)
