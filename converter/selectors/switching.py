"""Selectors that switch one layer of a uniform model and look at the answer's loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from converter.mask import FULL, SLIDING
from converter.selectors.base import ExampleScores, MeasuredSelector, example_scores

if TYPE_CHECKING:
    from converter.data import Example
    from converter.forward.meter import Advance, Meter
    from converter.forward.rows import Extent, Kinds
    from converter.mask import Mask


def switching_selector(name: str, summary: str, others: str) -> MeasuredSelector:
    """A selector by one switch.

    Args:
        name: what `--method` calls it.
        summary: one line for help and cards.
        others: the kind of every layer but the switched one, which has the other kind. The score
            is what full attention in that layer takes off the loss.
    """

    def measure(
        meter: Meter, examples: Sequence[Example], layers: Sequence[int], advance: Advance
    ) -> list[ExampleScores]:
        total = meter.layers
        measured = []
        answers = meter.answers(examples, plans_of(others, layers, total), advance)
        for example, (uniform, *switched) in zip(examples, answers, strict=True):
            # What full attention in the layer takes off, whichever of the two has it there.
            sign = 1 if others == SLIDING else -1
            scores = {
                layer: sign * (uniform.nll - answer.nll)
                for layer, answer in zip(layers, switched, strict=True)
            }
            full = uniform.nll if others == FULL else None
            sliding = uniform.nll if others == SLIDING else None
            measured.append(example_scores(example, full, sliding, scores, total))
        return measured

    def cost(extent: Extent, mask: Mask, total: int, layers: Sequence[int]) -> float:
        from converter.forward.rows import layer_forwards

        return layer_forwards(plans_of(others, layers, total), extent, mask)

    return MeasuredSelector(name, summary, measure, cost, single=True)


def plans_of(others: str, layers: Sequence[int], total: int) -> list[Kinds]:
    """The uniform plan, and one for each layer that is switched."""
    switched = FULL if others == SLIDING else SLIDING
    return [
        (others,) * total,
        *((others,) * layer + (switched,) + (others,) * (total - layer - 1) for layer in layers),
    ]
