"""Selectors that keep the layers with the best scores, each layer scored by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import fsum
from typing import TYPE_CHECKING

from converter.calibration.selectors.base import (
    Choice,
    ExampleScores,
    Scorer,
    Selector,
    means,
    rank,
)
from converter.calibration.selectors.first_order import FIRST_ORDER
from converter.calibration.selectors.race import Race, after_round, round_ends, screened_race

if TYPE_CHECKING:
    from converter.calibration.evaluator import PlanEvaluator
    from converter.inference.positions import TokenSpans
    from converter.model.mask import Mask

# Cheap, and right about small effects: it decides what need not be scored exactly.
_SCREEN = FIRST_ORDER


def by_score(scorer: Scorer) -> Selector:
    """The selector that ranks layers by their mean score.

    Where every layer costs something of its own and the effort allows it, scoring is a race: it
    stops where it is clear which layers are kept.
    """

    def choose(evaluator: PlanEvaluator, keep: int) -> Choice:
        if scorer.single and evaluator.effort.race and 0 < keep < evaluator.total:
            return _race(evaluator, scorer, keep)
        examples = evaluator.scores(scorer, range(evaluator.total))
        return Choice(rank(means(examples)), tuple(examples))

    def cost(spans: TokenSpans, mask: Mask, total: int, _keep: int) -> float:
        return scorer.cost(spans, mask, total, range(total))

    return Selector(
        scorer.name,
        scorer.summary,
        choose,
        cost,
        unit=scorer.unit,
        needs_gradients=scorer.needs_gradients,
    )


def _race(evaluator: PlanEvaluator, scorer: Scorer, keep: int) -> Choice:
    race, known = Race(keep), list[ExampleScores]()
    everything = range(evaluator.total)
    if evaluator.effort.screen:
        known = evaluator.scores(_SCREEN, everything)
        race = screened_race([fsum(e.scores[i] or 0.0 for e in known) for i in everything], keep)
        known = [_only(example, race.screened) for example in known]
    ends = round_ends(len(evaluator.examples))
    raced: list[ExampleScores] = []
    for begin, end in zip((0, *ends), ends, strict=False):
        layers = race.open_layers(evaluator.total)
        if not layers:
            break
        raced += evaluator.scores(scorer, layers, end, begin)
        by_layer = {i: [e.scores[i] or 0.0 for e in raced] for i in layers}
        race = after_round(race, by_layer, len(ends), end - begin)
    examples = _merged(known, raced)
    # What the race decided comes before what it left open.
    scores = means(examples)
    order = sorted(everything, key=lambda i: (race.place(i), -scores[i], i))
    return Choice(tuple(order), tuple(examples), race)


def _only(example: ExampleScores, layers: Sequence[int]) -> ExampleScores:
    """An example with the scores of some layers only."""
    scores = tuple(s if i in layers else None for i, s in enumerate(example.scores))
    return replace(example, scores=scores)


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
            together.append(replace(second, scores=scores))
        else:
            together.append(first)
    return together
