"""What a plan costs in quality, measured on examples that the layers were not chosen on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from converter.scores import Estimate, estimate


@dataclass(frozen=True)
class Outcome:
    """How a set of layer kinds did on the held-out examples.

    Attributes:
        name: `original`, `hybrid`, `all sliding`, or `periodic, offset N`.
        full_attention_layers: its full-attention layers.
        nll: answer NLL of each example, nats per token.
        correct: whether every answer token was the most likely one, by example.
    """

    name: str
    full_attention_layers: tuple[int, ...]
    nll: tuple[float, ...]
    correct: tuple[bool, ...]

    @property
    def loss(self) -> Estimate:
        """Mean answer NLL with its standard error."""
        return estimate(self.nll)

    @property
    def accuracy(self) -> Estimate:
        """Share of answers that greedy decoding gets right, with its standard error."""
        return estimate([float(right) for right in self.correct])

    def loss_above(self, other: Outcome) -> Estimate:
        """Paired difference of answer NLL to another outcome on the same examples."""
        return estimate([a - b for a, b in zip(self.nll, other.nll, strict=True)])


@dataclass(frozen=True)
class Quality:
    """The original, the hybrid and the plans it is compared with, on the same examples."""

    original: Outcome
    hybrid: Outcome
    others: tuple[Outcome, ...]

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """All of them, the original first."""
        return (self.original, self.hybrid, *self.others)

    def to_json(self) -> dict[str, Any]:
        """As saved in the checkpoint."""
        return {
            "examples": len(self.original.nll),
            "outcomes": [
                {
                    "name": outcome.name,
                    "full_attention_layers": list(outcome.full_attention_layers),
                    "nll": asdict(outcome.loss),
                    "nll_above_original": asdict(outcome.loss_above(self.original)),
                    "answers_right": asdict(outcome.accuracy),
                    "per_example": {"nll": list(outcome.nll), "correct": list(outcome.correct)},
                }
                for outcome in self.outcomes
            ],
        }


def quality_from_json(value: Mapping[str, Any]) -> Quality:
    """Read what `Quality.to_json` wrote."""
    outcomes = [
        Outcome(
            record["name"],
            tuple(record["full_attention_layers"]),
            tuple(record["per_example"]["nll"]),
            tuple(record["per_example"]["correct"]),
        )
        for record in value["outcomes"]
    ]
    return Quality(outcomes[0], outcomes[1], tuple(outcomes[2:]))
