"""Selectors that score each layer by itself and keep the best."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from converter.calibration.scores import ExampleScores, Race, means, rank
from converter.calibration.selectors.base import Choice, Selector
from converter.calibration.selectors.racing import after_round, round_ends
from converter.inference.example import Example
from converter.inference.positions import TokenSpans
from converter.model.mask import Mask
from converter.plan.units import Units

if TYPE_CHECKING:
    from converter.calibration.cache import Record
    from converter.calibration.evaluator import PlanEvaluator
    from converter.inference.runner import Advance, ModelRunner


@dataclass(frozen=True)
class LayerSelector(Selector):
    """Ranks layers by their mean score.

    Where every layer costs something of its own and the evaluator allows it, scoring is a race: it
    stops where it is clear which layers are kept.

    Attributes:
        separable: whether scoring fewer layers is cheaper.
    """

    separable: bool = True

    @abstractmethod
    def measure(
        self,
        runner: ModelRunner,
        examples: Sequence[Example],
        chosen: Sequence[int],
        advance: Advance,
        units: Units,
    ) -> list[ExampleScores]:
        """Score the chosen ones of the units on examples."""

    @abstractmethod
    def cost_of_scoring(
        self, spans: TokenSpans, mask: Mask, units: Units, chosen: Sequence[int]
    ) -> float:
        """What scoring some units costs for one example of such spans, in layer-forwards."""

    def scores(
        self,
        evaluator: PlanEvaluator,
        chosen: Sequence[int],
        begin: int = 0,
        end: int | None = None,
    ) -> list[ExampleScores]:
        """What the examples from `begin` to `end` say of some units, one by one."""
        units = evaluator.units
        return recorded_scores(
            evaluator,
            f"{self.label} {'-'.join(map(str, chosen))}",
            lambda runner, some, advance: self.measure(runner, some, chosen, advance, units),
            lambda spans: self.cost_of_scoring(spans, evaluator.mask, units, chosen),
            range(len(evaluator.examples))[begin:end],
            needs_gradients=self.needs_gradients,
        )

    def choose(self, evaluator: PlanEvaluator, keep: int) -> Choice:
        """The layers by mean score, or as a race decides."""
        if self.separable and evaluator.race and 0 < keep < evaluator.total:
            return self._race(evaluator, keep)
        examples = self.scores(evaluator, range(evaluator.total), end=self.most_examples)
        return Choice(rank(means(examples)), tuple(examples))

    def cost(self, spans: TokenSpans, mask: Mask, units: Units, keep: int) -> float:  # noqa: ARG002
        """That of every unit."""
        return self.cost_of_scoring(spans, mask, units, range(units.total))

    def _race(self, evaluator: PlanEvaluator, keep: int) -> Choice:
        race, examples = Race(keep), list[ExampleScores]()
        ends = round_ends(len(evaluator.examples))
        for begin, end in zip((0, *ends), ends, strict=False):
            layers = race.open_layers(range(evaluator.total))
            if not layers:
                break
            examples += self.scores(evaluator, layers, begin, end)
            by_layer = {i: [e.scores[i] or 0.0 for e in examples] for i in layers}
            race = after_round(race, by_layer, len(ends), end - begin)
        # What the race decided comes before what it left open.
        scores = means(examples)
        order = sorted(range(evaluator.total), key=lambda i: (race.place(i), -scores[i], i))
        return Choice(tuple(order), tuple(examples), race)


def recorded_scores(
    evaluator: PlanEvaluator,
    name: str,
    measure: Callable[[ModelRunner, Sequence[Example], Advance], Sequence[ExampleScores]],
    cost: Callable[[TokenSpans], float],
    indices: Sequence[int],
    *,
    needs_gradients: bool,
) -> list[ExampleScores]:
    """Scores of the examples at some indices, each measured once; see `PlanEvaluator.records`."""

    def find(runner: ModelRunner, some: Sequence[Example], advance: Advance) -> Sequence[Record]:
        return [{"scores": asdict(scores)} for scores in measure(runner, some, advance)]

    records = evaluator.records(
        name,
        find,
        lambda example: cost(evaluator.spans(example)),
        indices,
        needs_gradients=needs_gradients,
    )
    return [ExampleScores.from_json(record["scores"]) for record in records]


def example_scores(
    example: Example, full: float | None, sliding: float | None, scores: Iterable[float | None]
) -> ExampleScores:
    """What an example says, from its ends and every layer's score."""
    lengths = len(example.prompt), len(example.answer)
    return ExampleScores(example.kind, *lengths, full, sliding, tuple(scores))
