"""What a plan costs in quality, measured on examples that the layers were not chosen on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from converter.scores import Estimate, Share, estimate, share


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
        found = []
        sliding = next((o for o in self.others if not o.full_attention_layers), None)
        if sliding is not None and not _clear(sliding.loss_above(self.original)):
            found.append(
                "These examples hardly need long range: with every layer sliding the model loses "
                f"{sliding.loss_above(self.original)} on them. The scores are close to noise; "
                "choose data whose answers depend on something far away."
            )
        periodic = [o for o in self.others if o.name.startswith("periodic")]
        if periodic:
            best = min(periodic, key=lambda outcome: outcome.loss.mean)
            margin = best.loss_above(self.hybrid)
            if best.full_attention_layers == self.hybrid.full_attention_layers:
                found.append(
                    f"This plan is the periodic one at {best.name.removeprefix('periodic, ')}; the "
                    "other offsets show what choosing by period risks."
                )
            elif margin.mean < 0:
                found.append(
                    f"A plan chosen without measuring ({best.name}) did better than this one, by "
                    f"{self.hybrid.loss_above(best)}."
                )
            elif not _clear(margin):
                found.append(
                    f"The plan beats the best periodic one ({best.name}) by {margin}: no clear "
                    "difference."
                )
        return found

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
