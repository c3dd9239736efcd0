"""What a way of choosing layers has to say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from converter.calibration.evaluator import PlanEvaluator
    from converter.calibration.selectors.race import Race
    from converter.inference.example import Example
    from converter.inference.positions import TokenSpans
    from converter.inference.runner import Advance, ModelRunner
    from converter.model.mask import Mask


NATS = "nats per answer token"


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
class Scorer:
    """A way to score layers one by one by running the model on examples.

    Attributes:
        name: what `--method` calls it.
        summary: one line for help and cards.
        measure: scores the named layers on examples.
        cost: what that costs for one example of an extent, in layer-forwards, given the mask, the
            number of layers and the layers to score.
        single: whether each layer costs something of its own, so that scoring fewer is cheaper.
        unit: of the scores.
        heavy: whether it takes as much memory as gradients do.
    """

    name: str
    summary: str
    measure: Callable[[ModelRunner, Sequence[Example], Sequence[int], Advance], list[ExampleScores]]
    cost: Callable[[TokenSpans, Mask, int, Sequence[int]], float]
    single: bool
    unit: str = NATS
    needs_gradients: bool = False


@dataclass(frozen=True)
class Choice:
    """What a selector says.

    Attributes:
        order: every layer, the one to keep first; a plan keeps as many as its budget allows.
        examples: what each example says of each layer.
        race: how scoring was cut short; None when every layer was scored on every example.
        heads: a gate for each KV head of every layer, higher for one that deserves full attention
            more; None where heads were not told apart.
    """

    order: tuple[int, ...]
    examples: tuple[ExampleScores, ...]
    race: Race | None = None
    heads: tuple[tuple[float, ...], ...] | None = None


@dataclass(frozen=True)
class Selector:
    """A way to choose layers by running the model.

    Attributes:
        name: what `--method` calls it.
        summary: one line for help, cards and documentation.
        choose: orders the layers by what a study finds, for a plan that keeps so many.
        cost: what that may cost for one example of an extent, in layer-forwards, given the mask,
            the number of layers and how many are kept.
        unit: of the scores.
        by_mean: whether the order is that of the mean scores.
        heavy: whether it takes as much memory as gradients do.
        nested: whether the front of its order, at any length, is what it would choose for that
            length, or close to it: then one order serves every budget.
    """

    name: str
    summary: str
    choose: Callable[[PlanEvaluator, int], Choice]
    cost: Callable[[TokenSpans, Mask, int, int], float]
    unit: str = NATS
    by_mean: bool = True
    needs_gradients: bool = False
    nested: bool = True


@dataclass(frozen=True)
class Baseline:
    """A way to choose layers without measuring anything.

    Attributes:
        name: what `--method` calls it.
        summary: one line for help, cards and documentation.
        layers: full-attention layers of a plan, given the number of layers, how many are kept, and
            which of the variants is meant.
        variants: how many different plans there are, given the number of layers and how many are
            kept; None for any number.
    """

    name: str
    summary: str
    layers: Callable[[int, int, int], tuple[int, ...]]
    variants: Callable[[int, int], int] | None


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


def means(examples: Sequence[ExampleScores]) -> list[float]:
    """Each layer's mean score over the examples that it was scored on."""
    total = len(examples[0].scores)
    columns = ([s for e in examples if (s := e.scores[i]) is not None] for i in range(total))
    return [fsum(column) / len(column) for column in columns]


def rank(scores: Sequence[float]) -> tuple[int, ...]:
    """Layer indices by descending score; equal scores keep the order of the layers."""
    return tuple(sorted(range(len(scores)), key=lambda i: (-scores[i], i)))
