"""What plans lose on one set of examples, each thing found out once.

Selectors ask for the losses of sets of full-attention layers, or for records of their own. What was
found is on disk, for a killed run to go on with, and for selectors that ask for the same to share.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING

from converter.calibration.cache import Record, ResultCache, open_cache
from converter.calibration.data.examples import digest_of
from converter.calibration.run import CalibrationRun, Find
from converter.common.errors import DataError
from converter.common.progress import Bar, Progress
from converter.inference.example import Example
from converter.inference.positions import LayerTypes, TokenSpans, layer_forwards, token_spans
from converter.plan.units import Units

if TYPE_CHECKING:
    from converter.inference.runner import Advance, Answer, ModelRunner

# A set of full-attention units; the others slide.
FullUnits = frozenset[int]


@dataclass
class CostTally:
    """What one selector asked for, as if nobody had asked before.

    Attributes:
        layer_forwards: decoder layers run, in runs over one whole example.
    """

    layer_forwards: float = 0.0
    _seen: set[tuple[object, int]] = field(default_factory=set)

    def is_new(self, thing: object, index: int) -> bool:
        """Whether it was not asked of this example before; from now on it was."""
        new = (thing, index) not in self._seen
        self._seen.add((thing, index))
        return new


class PlanEvaluator:
    """Losses of plans, and other records, on some examples, which a cache knows as its `split`.

    Units are counted in the layers that attend fully in the model itself, lowest first.

    Attributes:
        units: what plans decide one by one.
        kv_heads: key/value heads of each layer.
        mask: what sliding layers see.
        examples: what is read.
        race: whether scoring may stop where it is clear which layers are kept.
        cache: keeps what is found.
    """

    def __init__(
        self,
        run: CalibrationRun,
        cache: ResultCache,
        examples: Sequence[Example],
        split: str,
        *,
        race: bool = False,
    ) -> None:
        self.shape = run.source.shape
        self.units = run.units
        self.kv_heads = run.source.shape.kv_heads
        self.mask = run.mask
        self.examples = tuple(examples)
        self.race = race
        self._run = run
        self.cache = cache
        self._split = split
        # Views of one kind of examples share all below but for the indices, which are of these.
        self._all_examples = self.examples
        self._indices: Sequence[int] = range(len(self.examples))
        # By what an example says, not by its place, so that a larger draw finds it again.
        self._digests = [digest_of(example) for example in self.examples]
        self._answers: dict[tuple[LayerTypes, int], Answer] = {}
        # What each record cost, by its name: several selectors may ask for it.
        self._costs: dict[str, float] = {}
        self._tally = CostTally()
        self._bar: Bar | None = None
        self._expected = 0.0

    @property
    def layer_forwards(self) -> float:
        """What everything found so far cost."""
        return math.fsum(self._costs.values())

    @property
    def layer_forwards_asked(self) -> float:
        """What the selector that is tallied has asked for, as if nobody had asked before."""
        return self._tally.layer_forwards

    def only(self, kind: str) -> PlanEvaluator:
        """A view of one kind of examples; what either finds, both know."""
        view = copy(self)
        mine = [i for i, example in enumerate(self.examples) if example.kind == kind]
        view.examples = tuple(self.examples[i] for i in mine)
        view._indices = [self._indices[i] for i in mine]
        return view

    @property
    def total(self) -> int:
        """How many units there are."""
        return self.units.total

    def telling(self, units: Units) -> PlanEvaluator:
        """A view whose sets are of other units; what either finds, both know."""
        view = copy(self)
        view.units = units
        return view

    @contextmanager
    def tallying(self, title: str, expected: float, progress: Progress) -> Iterator[CostTally]:
        """Count what is asked for meanwhile, under one bar, of maybe `expected` layer-forwards."""
        with progress(title, 0) as bar:
            self._tally, self._bar, self._expected = CostTally(), bar, expected
            try:
                yield self._tally
                # What was expected beyond this was a guess.
                bar.expect(0.0)
            finally:
                self._bar = None

    def spans(self, example: Example) -> TokenSpans:
        """Where the rows of an example lie in this model."""
        return token_spans(example, self.mask, kinds=self._run.source.shape.kinds)

    def losses(self, sets: Sequence[FullUnits]) -> list[float]:
        """The mean answer NLL with every set of full-attention units, in nats per token."""
        return [fmean(answer.nll for answer in answers) for answers in self.answers(sets)]

    def answers(
        self, sets: Sequence[FullUnits], begin: int = 0, end: int | None = None
    ) -> list[list[Answer]]:
        """Every set's answers to the examples from `begin` to `end`, set by set."""
        indices = self._indices[begin:end]
        plans = [self.units.types(full) for full in sets]
        wanted = list(dict.fromkeys(plans))
        # As many at once as scoring every layer takes, which is what memory is planned for.
        most = self.units.layers + 1
        for start in range(0, len(wanted), most):
            some = wanted[start : start + most]
            missing: dict[tuple[LayerTypes, ...], list[int]] = {}
            for index in indices:
                unknown = tuple(plan for plan in some if (plan, index) not in self._answers)
                missing.setdefault(unknown, []).append(index)
            for unknown, mine in missing.items():
                if unknown:
                    self._find_answers(unknown, mine)
            for index in indices:
                if new := [plan for plan in some if self._tally.is_new(plan, index)]:
                    self._tally.layer_forwards += self._cost_of(new)(self._all_examples[index])
        return [[self._answers[plan, index] for index in indices] for plan in plans]

    def _find_answers(self, plans: Sequence[LayerTypes], indices: Sequence[int]) -> None:
        from converter.inference.runner import Answer

        digest = hashlib.sha256(json.dumps(plans).encode()).hexdigest()[:16]

        def find(
            runner: ModelRunner, examples: Sequence[Example], advance: Advance
        ) -> Sequence[Record]:
            return [
                {name: [getattr(answer, name) for answer in answers] for name in ("nll", "correct")}
                for answers in runner.answers(examples, plans, advance)
            ]

        records = self._find(f"answers {digest}", indices, find, self._cost_of(plans))
        for index, record in zip(indices, records, strict=True):
            for plan, nll, correct in zip(plans, record["nll"], record["correct"], strict=True):
                self._answers[plan, index] = Answer(nll, correct)

    def _cost_of(self, plans: Sequence[LayerTypes]) -> Callable[[Example], float]:
        return lambda example: layer_forwards(plans, self.spans(example), self.mask)

    def records(
        self,
        name: str,
        find: Find,
        cost: Callable[[Example], float],
        indices: Sequence[int],
        *,
        needs_gradients: bool = False,
    ) -> list[Record]:
        """Find something out about some examples, unless it is known.

        Args:
            name: what it is called in the cache; says all that it depends on.
            find: makes the records of some examples.
            cost: of one example, in layer-forwards.
            indices: of the examples.
            needs_gradients: whether `find` takes as much memory as gradients do.

        Raises:
            DataError: a number that was found is not finite.
        """
        mine = [self._indices[i] for i in indices]
        for index in mine:
            if self._tally.is_new(name, index):
                self._tally.layer_forwards += cost(self._all_examples[index])
        return self._find(name, mine, find, cost, needs_gradients=needs_gradients)

    def _find(
        self,
        name: str,
        indices: Sequence[int],
        find: Find,
        cost: Callable[[Example], float],
        *,
        needs_gradients: bool = False,
    ) -> list[Record]:
        names = [f"{self._split} {self._digests[i]} {name}" for i in indices]
        # A row that stands twice in the data is measured once.
        examples = {name: self._all_examples[i] for name, i in zip(names, indices, strict=True)}
        whole = {record: cost(example) for record, example in examples.items()}
        self._costs |= whole
        bar, group, missing = self._bar, 1, self.cache.missing(list(examples))
        assert bar is not None  # noqa: S101 - asked for inside `tallying`
        left = math.fsum(whole[record] for record in missing)
        # What comes after this is a guess, unless this is all.
        self._expected = max(0.0, self._expected - math.fsum(whole.values()))
        bar.expect(left + (self._expected if left else 0.0))
        # A process that has nothing left to find does not load the model.
        if missing:
            runner, group = self._run.runner(needs_gradients)

        def checked(some: Sequence[str]) -> Sequence[Record]:
            found = find(runner, [examples[record] for record in some], bar.advance)
            check_finite(found)
            # Before they are kept: they may be of other weights, or of a mixture.
            self._run.source.files.check()
            return found

        filled = self.cache.fill(list(examples), group, checked)
        records = dict(zip(examples, filled, strict=True))
        return [records[name] for name in names]


@contextmanager
def open_evaluator(
    run: CalibrationRun, examples: Sequence[Example], split: str, *, race: bool = False
) -> Iterator[PlanEvaluator]:
    """An evaluator with a cache in the run's work folder; raises as `open_cache`."""
    with open_cache(run.work, split, run.settings, run.processes, fresh=run.fresh) as cache:
        yield PlanEvaluator(run, cache, examples, split, race=race)


def check_finite(value: object) -> None:
    """Refuse, by a DataError, losses that are no numbers, however deep in records they are."""
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(
            "the model's loss is not a finite number",
            got=value,
            next_step="try --dtype float32 or bfloat16; if it stays, the weights are damaged",
        )
    if isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            check_finite(part)
