"""What a way of choosing layers has to say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from converter.data import Example
    from converter.forward.meter import Advance, Meter
    from converter.forward.rows import Extent
    from converter.mask import Mask


@dataclass(frozen=True)
class ExampleScores:
    """What one example says of each layer.

    Attributes:
        kind: what the example exercises.
        prompt_tokens, answer_tokens: its length.
        full: mean answer NLL with all layers full, in nats per token; None where not measured.
        sliding: the same with all layers sliding.
        scores: each layer's score, higher for a layer that deserves full attention more; None for
            a layer that was not scored on this example.
    """

    kind: str
    prompt_tokens: int
    answer_tokens: int
    full: float | None
    sliding: float | None
    scores: tuple[float | None, ...]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ExampleScores:
        """Read what `dataclasses.asdict` gave."""
        return cls(**{**value, "scores": tuple(value["scores"])})


@dataclass(frozen=True)
class MeasuredSelector:
    """A selector that scores layers by running the model on examples.

    Attributes:
        name: what `--method` calls it.
        summary: one line for help and cards.
        measure: scores the named layers on examples.
        cost: what that costs for one example of an extent, in layer-forwards, given the mask, the
            number of layers and the layers to score.
        single: whether each layer costs something of its own, so that scoring fewer is cheaper.
    """

    name: str
    summary: str
    measure: Callable[[Meter, Sequence[Example], Sequence[int], Advance], list[ExampleScores]]
    cost: Callable[[Extent, Mask, int, Sequence[int]], float]
    single: bool


def example_scores(
    example: Example,
    full: float | None,
    sliding: float | None,
    scores: Mapping[int, float],
    total: int,
) -> ExampleScores:
    """Put one example's scores, by layer, in order."""
    return ExampleScores(
        kind=example.kind,
        prompt_tokens=len(example.prompt),
        answer_tokens=len(example.answer),
        full=full,
        sliding=sliding,
        scores=tuple(scores.get(layer) for layer in range(total)),
    )


def rank(scores: Sequence[float]) -> tuple[int, ...]:
    """Layer indices by descending score; equal scores keep the order of the layers."""
    return tuple(sorted(range(len(scores)), key=lambda i: (-scores[i], i)))
