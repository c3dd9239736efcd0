"""Guided search: gate gradients propose sets of layers, true losses decide between them.

A gradient costs about three passes whatever the depth, and says of every layer what its full
attention is worth beside the others; a search that measures every layer for itself pays for each.
At a set itself gates are 0 and 1, where the response to them is flat, so gradients are taken with
the gates pulled back towards each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from converter.calibration.scores import means, rank
from converter.calibration.selectors.base import Choice, Selector
from converter.calibration.selectors.gates import gradient_record, recorded_gradients
from converter.calibration.selectors.ranking import example_scores
from converter.calibration.selectors.search import Losses, by_loss, measure, typical_cost
from converter.inference.positions import TokenSpans, gradient_layer_forwards
from converter.model.mask import FULL, Mask

if TYPE_CHECKING:
    from converter.calibration.evaluator import PlanEvaluator
    from converter.calibration.run import Find
    from converter.inference.example import Example
    from converter.inference.gate_gradients import GateGradients, Gates
    from converter.inference.runner import Advance, ModelRunner

# The loss's derivative by every layer's gate, at some gates, in nats per answer token.
SlopesAt = Callable[["Gates"], Sequence[float]]

# Gauss-Legendre nodes on the way from all sliding to all full: two are exact for a cubic.
_NODES = (0.5 - 3**-0.5 / 2, 0.5 + 3**-0.5 / 2)
# Gates of sliding and of full layers where a set's gradient is taken: first far from the set, then
# close to it, where what layers do together shows. On 50 synthetic losses of 36 and 64 layers (as
# `lookups` of the tests) the second pair took the loss above the search's from 0.07 to 0.02 nats.
_PULLED_BACK = ((0.25, 0.75), (0.05, 0.95))


@dataclass(frozen=True)
class Effort:
    """How much guided search spends.

    Attributes:
        examples: at most so many, the first ones, are read for gradients and first measurements.
        rounds: of swaps, at most.
        tries: swaps measured in a round.
        finalists: the best of them, measured on all examples.
    """

    examples: int = 32
    rounds: int = 6
    tries: int = 8
    finalists: int = 3


def guided_layers(
    slopes_at: SlopesAt, quick: Losses, exact: Losses, total: int, keep: int, effort: Effort
) -> frozenset[int]:
    """The set that no swap proposed by its own gradient makes better.

    Args:
        slopes_at: what a layer's full attention adds to the loss; below 0 where it helps.
        quick, exact: losses of sets on some examples, and on all.
    """
    slopes = [slopes_at(((node,),) * total) for node in _NODES]
    start = rank([-fmean(of_layer) for of_layer in zip(*slopes, strict=True)])
    now, level = frozenset(start[:keep]), 0
    for _ in range(effort.rounds):
        swaps = promising_swaps(now, slopes_at(gates_around(now, total, level)), effort.tries)
        before, *after = measure(quick, [now, *swaps])
        better = [one.layers for one in by_loss(after) if one.loss < before.loss]
        before, *after = measure(exact, [now, *better[: effort.finalists]])
        best = by_loss([before, *after])[0]
        if best.loss < before.loss:
            now, level = best.layers, 0
        elif swaps and level + 1 < len(_PULLED_BACK):
            level += 1
        else:
            break
    return now


def gates_around(layers: frozenset[int], total: int, level: int) -> Gates:
    """One gate a layer, pulled back from where it is closed or open."""
    return tuple((_PULLED_BACK[level][layer in layers],) for layer in range(total))


def promising_swaps(
    layers: frozenset[int], slopes: Sequence[float], tries: int
) -> list[frozenset[int]]:
    """The swaps of one layer for another that the slopes foretell to lower the loss the most.

    Equally promising ones come in the order of the layer that goes, then of the one that comes.
    """
    foretold = {
        (slopes[into] - slopes[out], out, into): layers - {out} | {into}
        for out in layers
        for into in range(len(slopes))
        if into not in layers
    }
    return [foretold[swap] for swap in sorted(foretold)[:tries]]


@dataclass(frozen=True)
class Guided(Selector):
    """Swaps that gradients propose, from the best layers by a short path integral."""

    effort: Effort = Effort()

    def choose(self, evaluator: PlanEvaluator, keep: int) -> Choice:
        """The set found, and then the others, each in the order of the last gradient."""
        some = min(self.effort.examples, len(evaluator.examples))

        def gradients(gates: Gates) -> list[GateGradients]:
            return recorded_gradients(evaluator, "answer", gates, _find_at(gates), range(some))

        def slopes_at(gates: Gates) -> list[float]:
            by_example = [found.by_layer for found in gradients(gates)]
            return [fmean(of_layer) for of_layer in zip(*by_example, strict=True)]

        def quick(sets: Sequence[frozenset[int]]) -> list[float]:
            answers = evaluator.answers(sets, end=some)
            return [fmean(answer.nll for answer in of_set) for of_set in answers]

        total = evaluator.total
        found = guided_layers(slopes_at, quick, evaluator.losses, total, keep, self.effort)
        last = gradients(gates_around(found, total, 0))
        scores: list[list[float | None]] = [
            [-slope for slope in gradient.by_layer] for gradient in last
        ]
        # Examples that no gradient was taken on only decided between sets.
        scores += [[None] * total] * (len(evaluator.examples) - some)
        examples = tuple(
            example_scores(example, None, None, of_example)
            for example, of_example in zip(evaluator.examples, scores, strict=True)
        )
        # A stable sort: those that were found come first.
        order = sorted(rank(means(examples)), key=lambda layer: layer not in found)
        return Choice(tuple(order), examples)

    def cost(self, spans: TokenSpans, mask: Mask, total: int, keep: int) -> float:  # noqa: ARG002
        """At most: a round that changes nothing is the last, and samples may be fewer."""
        effort = self.effort
        gradients = len(_NODES) + effort.rounds + 1
        gradient = gradient_layer_forwards((FULL,) * total, spans, mask)
        sets = effort.rounds * (effort.tries + effort.finalists + 2)
        return gradients * gradient + typical_cost(spans, mask, sets, total)


def _find_at(gates: Gates) -> Find:
    def find(
        runner: ModelRunner, examples: Sequence[Example], advance: Advance
    ) -> list[dict[str, object]]:
        return [gradient_record(one) for one in runner.gate_gradients(examples, gates, advance)]

    return find


GUIDED = Guided(
    "guided",
    "swaps that gate gradients propose and true losses decide, from a short path integral",
    needs_gradients=True,
)
