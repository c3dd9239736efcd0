"""A study: everything that is found out about one set of examples, each thing once.

Selectors ask a study for losses of sets of full-attention layers and for scores of single layers.
What has been found is kept in a notebook, so that a killed run goes on where it was, and so that
selectors that ask for the same thing share it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from converter.calibration.cache import Record, ResultCache, open_cache
from converter.calibration.objective import Objective
from converter.calibration.run import CachedJob, CalibrationRun
from converter.calibration.selectors.base import ExampleScores, Scorer
from converter.calibration.selectors.switching import SingleLayerScorer
from converter.common.errors import DataError
from converter.common.progress import Bar, Progress
from converter.inference.example import Example
from converter.inference.positions import layer_forwards, token_spans
from converter.plan.plan import layer_types_of

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from converter.inference.runner import Advance, Answer, ModelRunner


@dataclass(frozen=True)
class ScoringOptions:
    """How much of a measurement may be left out.

    Attributes:
        race: stop scoring a layer when it is clear on which side of the budget's boundary it is.
        screen: let a first-order score leave only layers near the boundary to be raced.
    """

    race: bool = False
    screen: bool = False


THOROUGH = ScoringOptions()
DEFAULT_OBJECTIVE = Objective()

# A set of full-attention layers; the others slide.
Layers = frozenset[int]
# Makes the records of some examples.
Find = Callable[["ModelRunner", Sequence[Example], "Advance"], Sequence[Record]]


@dataclass
class CostTally:
    """What one selector asked for, as if nobody had asked before.

    Attributes:
        layer_forwards: decoder layers run, in runs over one whole example.
    """

    layer_forwards: float = 0.0
    _seen: set[tuple[object, int]] = field(default_factory=set)

    def is_new(self, thing: object, place: int) -> bool:
        """Whether it was not asked of this example before; from now on it was."""
        new = (thing, place) not in self._seen
        self._seen.add((thing, place))
        return new


@dataclass
class _Known:
    """What all views of a study have found out, by example."""

    answers: dict[Layers, dict[int, Answer]] = field(default_factory=dict)
    # What each record cost, by its name: several selectors may ask for it.
    costs: dict[str, float] = field(default_factory=dict)
    # (answer rows, hidden) above the layers, while they are kept.
    states: dict[Example, dict[Layers, torch.Tensor]] | None = None


class PlanEvaluator:
    """Losses and scores on some examples.

    Args:
        run: the model and how it is run.
        cache: keeps what is found.
        examples: what is read.
        split: what the examples are called in the notebook.
        objective: makes one number of the examples' losses.
        effort: what may be left out.

    Attributes:
        total: how many layers the model has.
        kv_heads: key/value heads of each.
        mask: what sliding layers see.
        examples, objective, effort: as given.
    """

    def __init__(
        self,
        run: CalibrationRun,
        cache: ResultCache,
        examples: Sequence[Example],
        split: str,
        objective: Objective = DEFAULT_OBJECTIVE,
        effort: ScoringOptions = THOROUGH,
    ) -> None:
        self.total = run.source.shape.layers
        self.kv_heads = run.source.shape.kv_heads
        self.mask = run.mask
        self.examples = tuple(examples)
        self.objective = objective
        self.effort = effort
        self._every = self.examples
        self._places: Sequence[int] = range(len(examples))
        self._measurement = run
        self._cache = cache
        self._split = split
        self._known = _Known()
        self._tally = CostTally()
        self._bar: Bar | None = None
        self._expected = 0.0

    @property
    def found_earlier(self) -> int:
        """How many pieces earlier runs found."""
        return self._cache.found_earlier

    @property
    def seconds(self) -> float:
        """Time that all processes spent on what is known."""
        return self._cache.seconds

    @property
    def layer_forwards(self) -> float:
        """What everything found so far cost."""
        return math.fsum(self._known.costs.values())

    def only(self, kind: str) -> PlanEvaluator:
        """The study of one kind of examples; what either finds, both know."""
        view = copy(self)
        mine = [i for i, example in enumerate(self.examples) if example.kind == kind]
        view.examples = tuple(self.examples[i] for i in mine)
        view._places = [self._places[i] for i in mine]
        return view

    @contextmanager
    def tallying(self, title: str, expected: float, progress: Progress) -> Iterator[CostTally]:
        """Count what is asked for meanwhile, under one bar.

        Args:
            title: of the bar.
            expected: layer-forwards that it may take in all.
            progress: opens the bar.
        """
        with progress(title, 0) as bar:
            self._tally, self._bar, self._expected = CostTally(), bar, expected
            try:
                yield self._tally
                # What was expected beyond this was a guess.
                bar.expect(0.0)
            finally:
                self._bar = None

    def losses(self, sets: Sequence[Layers], count: int | None = None) -> list[float]:
        """The objective for every set of full-attention layers, lower is better.

        Args:
            sets: what keeps full attention.
            count: look at the first so many examples only.
        """
        full = self._full_losses(count)
        kinds = [example.kind for example in self.examples[:count]]
        return [
            self.objective.value(kinds, [answer.nll for answer in answers], full)
            for answers in self.answers(sets, count)
        ]

    def _full_losses(self, count: int | None) -> list[float]:
        """The full-attention model's, where the objective wants them."""
        if not self.objective.needs_full:
            return []
        (answers,) = self.answers([frozenset(range(self.total))], count)
        return [answer.nll for answer in answers]

    def answers(
        self, sets: Sequence[Layers], count: int | None = None, begin: int = 0
    ) -> list[list[Answer]]:
        """Every set's answers to the examples from `begin` to `count`, set by set."""
        places = self._places[begin:count]
        wanted = list(dict.fromkeys(sets))
        # As many at once as scoring every layer takes, which is what memory is planned for.
        for start in range(0, len(wanted), self.total + 1):
            some = wanted[start : start + self.total + 1]
            missing: dict[tuple[Layers, ...], list[int]] = {}
            for place in places:
                unknown = tuple(s for s in some if place not in self._known.answers.get(s, {}))
                missing.setdefault(unknown, []).append(place)
            for unknown, mine in missing.items():
                if unknown:
                    self._find_answers(unknown, mine)
            self._charge_answers(some, places)
        return [[self._known.answers[s][place] for place in places] for s in sets]

    def _find_answers(self, sets: Sequence[Layers], places: Sequence[int]) -> None:
        import torch

        from converter.inference.runner import Answer

        plans = [layer_types_of(layers, self.total) for layers in sets]
        digest = hashlib.sha256(json.dumps([sorted(s) for s in sets]).encode()).hexdigest()[:16]

        def find(
            runner: ModelRunner, examples: Sequence[Example], advance: Advance
        ) -> Sequence[Record]:
            if self._known.states is None:
                found = runner.answers(examples, plans, advance)
            else:
                found = [
                    runner.answers_of_states(example, torch.stack(states))
                    for example, states in self._keep_states(runner, examples, sets, advance)
                ]
            return [
                {
                    "nll": [finite(answer.nll) for answer in answers],
                    "correct": [answer.correct for answer in answers],
                }
                for answers in found
            ]

        records = self._records(f"answers {digest}", places, find, self._cost_of(sets))
        for place, record in zip(places, records, strict=True):
            for layers, nll, correct in zip(sets, record["nll"], record["correct"], strict=True):
                self._known.answers.setdefault(layers, {})[place] = Answer(nll, correct)

    def _charge_answers(self, sets: Sequence[Layers], places: Sequence[int]) -> None:
        for place in places:
            new = [layers for layers in sets if self._tally.is_new(layers, place)]
            if new:
                self._tally.layer_forwards += self._cost_of(new)(self._every[place])

    @contextmanager
    def keeping_states(self) -> Iterator[None]:
        """Keep in memory what the answers' rows look like above the layers, for `foretold_losses`.

        Answer rows x width values for every set and example.
        """
        self._known.states = {}
        try:
            yield
        finally:
            self._known.states = None

    def _keep_states(
        self,
        runner: ModelRunner,
        examples: Sequence[Example],
        sets: Sequence[Layers],
        advance: Advance,
    ) -> list[tuple[Example, list[torch.Tensor]]]:
        assert self._known.states is not None  # noqa: S101 - inside `keeping_states`
        plans = [layer_types_of(layers, self.total) for layers in sets]
        found = runner.answer_states(examples, plans, advance)
        for example, states in zip(examples, found, strict=True):
            self._known.states.setdefault(example, {}).update(zip(sets, states, strict=True))
        return list(zip(examples, found, strict=True))

    def foretold_losses(self, known: Sequence[Layers], weights: NDArray[np.float64]) -> list[float]:
        """The objective if the answers' hidden states were sums of those of known sets.

        Args:
            known: sets that were asked for inside `keeping_states`.
            weights: (sums, known).
        """
        import torch

        runner, _ = self._measurement.runner(False)
        assert self._known.states is not None  # noqa: S101 - inside `keeping_states`
        mine: dict[int, list[float]] = {}
        for place in self._measurement.processes.share(self._places):
            example = self._every[place]
            kept = self._known.states.setdefault(example, {})
            # What an earlier run found is in the notebook, and its states are gone.
            if lost := [layers for layers in known if layers not in kept]:
                self._keep_states(runner, [example], lost, lambda _: None)
            states = torch.stack([kept[layers] for layers in known])
            mixing = torch.as_tensor(weights, dtype=states.dtype, device=states.device)
            mixed = torch.einsum("sp,prh->srh", mixing, states)
            mine[place] = [answer.nll for answer in runner.answers_of_states(example, mixed)]
        foretold: dict[int, list[float]] = {}
        for part in self._measurement.processes.everyones(mine):
            foretold |= part
        kinds = [example.kind for example in self.examples]
        by_sum = zip(*(foretold[place] for place in self._places), strict=True)
        full = self._full_losses(None)
        return [self.objective.value(kinds, losses, full) for losses in by_sum]

    def _cost_of(self, sets: Sequence[Layers]) -> Callable[[Example], float]:
        plans = [layer_types_of(layers, self.total) for layers in sets]
        return lambda example: layer_forwards(plans, token_spans(example, self.mask), self.mask)

    def scores(
        self, scorer: Scorer, layers: Sequence[int], count: int | None = None, begin: int = 0
    ) -> list[ExampleScores]:
        """What the examples from `begin` to `count` say of some layers, one by one."""
        examples = self.examples[begin:count]
        if isinstance(scorer, SingleLayerScorer):
            answers = self.answers(scorer.sets(layers, self.total), count, begin)
            return [
                scorer.of_answers(example, layers, self.total, mine)
                for example, mine in zip(examples, zip(*answers, strict=True), strict=True)
            ]

        def find(
            runner: ModelRunner, some: Sequence[Example], advance: Advance
        ) -> Sequence[Record]:
            return [
                {"scores": asdict(_finite_scores(found))}
                for found in scorer.measure(runner, some, layers, advance)
            ]

        records = self.records(
            f"{scorer.name} {'-'.join(map(str, layers))}",
            find,
            lambda example: scorer.cost(
                token_spans(example, self.mask), self.mask, self.total, layers
            ),
            range(len(self.examples))[begin:count],
            needs_gradients=scorer.needs_gradients,
        )
        return [ExampleScores.from_json(record["scores"]) for record in records]

    def records(
        self,
        name: str,
        find: Find,
        cost: Callable[[Example], float],
        places: Sequence[int] | None = None,
        *,
        needs_gradients: bool = False,
    ) -> list[Record]:
        """Find something out about some examples, unless it is known.

        Args:
            name: what it is called in the notebook; says all that it depends on.
            find: makes the records of some examples.
            cost: of one example, in layer-forwards.
            places: of the examples; all of them by default.
            heavy: whether `find` takes as much memory as gradients do.
        """
        mine = [self._places[i] for i in (range(len(self.examples)) if places is None else places)]
        for place in mine:
            if self._tally.is_new(name, place):
                self._tally.layer_forwards += cost(self._every[place])
        return self._records(name, mine, find, cost, needs_gradients=needs_gradients)

    def _records(
        self,
        name: str,
        places: Sequence[int],
        find: Find,
        cost: Callable[[Example], float],
        *,
        needs_gradients: bool = False,
    ) -> list[Record]:
        job = CachedJob(
            {f"{self._split} {place} {name}": self._every[place] for place in places},
            find,
            cost,
            needs_gradients,
        )
        whole = {piece: cost(example) for piece, example in job.pieces.items()}
        self._known.costs |= whole
        assert self._bar is not None  # noqa: S101 - asked for inside `tallying`
        left = job.cost_left(self._cache)
        # What comes after this is a guess, unless this is all.
        after = max(0.0, self._expected - math.fsum(whole.values()))
        self._expected = after
        self._bar.expect(left + (after if left else 0.0))
        return job.run(self._measurement, self._cache, self._bar)


@contextmanager
def open_evaluator(
    run: CalibrationRun,
    examples: Sequence[Example],
    split: str,
    objective: Objective = DEFAULT_OBJECTIVE,
    effort: ScoringOptions = THOROUGH,
) -> Iterator[PlanEvaluator]:
    """A study with a notebook in the measurement's work folder.

    Args:
        run: the model.
        examples: what is read.
        split: what the examples are called there.
        objective: makes one number of the examples' losses.
        effort: what may be left out.

    Raises:
        ScoresError: the work folder holds results of another measurement.
        OutputError: the work folder cannot be written.
    """
    fingerprint = run.fingerprint(examples)
    with open_cache(run.work, split, fingerprint, run.processes, fresh=run.fresh) as cache:
        yield PlanEvaluator(run, cache, examples, split, objective, effort)


def finite(nll: float) -> float:
    """A loss, if it is a number.

    Raises:
        DataError: it is not.
    """
    if not math.isfinite(nll):
        raise DataError(
            "the model's loss is not a finite number",
            got=nll,
            next_step="try --dtype float32 or bfloat16; if it stays, the weights are damaged",
        )
    return nll


def _finite_scores(scores: ExampleScores) -> ExampleScores:
    for number in (scores.full, scores.sliding, *scores.scores):
        if number is not None:
            finite(number)
    return scores
