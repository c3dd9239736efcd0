"""What a plan costs in quality, measured on examples that the layers were not chosen on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from converter.common.statistics import Estimate, Share, estimate, share


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
    def accuracy(self) -> Share:
        """Share of answers that greedy decoding gets right, with its 95% interval."""
        return share(sum(self.correct), len(self.correct))

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

    def findings(self) -> list[str]:
        """What the numbers say, and what they do not, in sentences."""
        return [*self._of_the_examples(), *self._of_the_plan()]

    def _of_the_examples(self) -> list[str]:
        """Whether the examples need long range at all."""
        sliding = next((o for o in self.others if not o.full_attention_layers), None)
        if sliding is None or _clear(sliding.loss_above(self.original)):
            return []
        return [
            "These examples hardly need long range: with every layer sliding the model loses "
            f"{sliding.loss_above(self.original)} on them. The scores are close to noise; "
            "choose data whose answers depend on something far away."
        ]

    def _of_the_plan(self) -> list[str]:
        """Whether the plan beats what nothing was measured for."""
        periodic = [o for o in self.others if o.name.startswith("periodic")]
        if not periodic:
            return []
        best = min(periodic, key=lambda outcome: outcome.loss.mean)
        offset = best.name.removeprefix("periodic, ")
        if best.full_attention_layers == self.hybrid.full_attention_layers:
            return [
                f"This plan is the periodic one at {offset}; the other offsets show what choosing "
                "by period risks."
            ]
        if _clear(best.loss_above(self.hybrid)):
            return []
        if _clear(self.hybrid.loss_above(best)):
            return [
                f"The periodic plan at {offset}, chosen without measuring, does better than this "
                f"one, by {self.hybrid.loss_above(best)}."
            ]
        return [
            f"The best periodic plan ({offset}) is {best.loss_above(self.hybrid)} above this one: "
            "no clear difference."
        ]

    def to_json(self) -> dict[str, Any]:
        """As saved in the checkpoint."""
        return {
            "examples": len(self.original.nll),
            "findings": self.findings(),
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


def _clear(difference: Estimate) -> bool:
    """Whether a difference is positive beyond two standard errors."""
    return difference.stderr is not None and difference.mean > 2 * difference.stderr
