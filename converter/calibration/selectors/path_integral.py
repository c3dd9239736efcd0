"""Path integral: gradients along the way from all sliding to all full.

All gates go from 0 to 1 together; a layer's score is the mean of -dL_ans/da_l on the way, so that
the scores sum to L_ans(all SWA) - L_ans(all FA) up to the quadrature (integrated gradients, arXiv
1703.01365). The sum is a check built in: `nll` in the scores file holds both ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum
from typing import TYPE_CHECKING

from converter.calibration.selectors.base import ExampleScores, Scorer, example_scores
from converter.model.mask import FULL, SLIDING

if TYPE_CHECKING:
    from converter.inference.example import Example
    from converter.inference.positions import TokenSpans
    from converter.inference.runner import Advance, ModelRunner
    from converter.model.mask import Mask

# Midpoints of so many equal parts of the way.
_NODES = 8


def _measure(
    runner: ModelRunner, examples: Sequence[Example], _layers: Sequence[int], advance: Advance
) -> list[ExampleScores]:
    total = runner.layers
    uniform = runner.answers(examples, [(FULL,) * total, (SLIDING,) * total], advance)
    nodes = [
        runner.gate_gradients(examples, (((node + 0.5) / _NODES,),) * total, advance)
        for node in range(_NODES)
    ]
    measured = []
    for place, example in enumerate(examples):
        full, sliding = uniform[place]
        scores = {
            layer: -fsum(node[place].by_layer[layer] for node in nodes) / _NODES
            for layer in range(total)
        }
        measured.append(example_scores(example, full.nll, sliding.nll, scores, total))
    return measured


def _cost(spans: TokenSpans, mask: Mask, total: int, _layers: Sequence[int]) -> float:
    from converter.inference.positions import gradient_layer_forwards, layer_forwards

    uniform = layer_forwards([(FULL,) * total, (SLIDING,) * total], spans, mask)
    return uniform + _NODES * gradient_layer_forwards((FULL,) * total, spans, mask)


PATH_INTEGRAL = Scorer(
    name="path-integral",
    summary="gate gradients averaged from all sliding to all full; they sum to the whole gap",
    measure=_measure,
    cost=_cost,
    single=False,
    needs_gradients=True,
)
