"""What plans cost in quality, on examples that no layer was chosen on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from converter.common.statistics import Estimate, Share, estimate, share

# Files hold the name only.
_OFFSET = ", offset "


def plan_name(method: str, offset: int | None) -> str:
    """What a plan is called where it is shown."""
    return method if offset is None else f"{method}{_OFFSET}{offset}"


@dataclass(frozen=True)
class Outcome:
    """How a set of layer kinds did on the held-out examples.

    Attributes:
        method: what chose the layers, or `original`, `hybrid` or `all sliding`.
        full_attention_layers: its full-attention layers.
        nll: answer NLL of each example, nats per token.
        correct: whether every answer token was the most likely one, by example.
        offset: the first full-attention layer of a periodic plan; None for any other.
    """

    method: str
    full_attention_layers: tuple[int, ...]
    nll: tuple[float, ...]
    correct: tuple[bool, ...]
    offset: int | None = None

    @property
    def name(self) -> str:
        """The method, and the offset where there is one."""
        return plan_name(self.method, self.offset)

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
        if sliding is None or sliding.loss_above(self.original).clearly_positive:
            return []
        return [
            "These examples hardly need long range: with every layer sliding the model loses "
            f"{sliding.loss_above(self.original)} on them. The scores are close to noise; "
            "choose data whose answers depend on something far away."
        ]

    def _of_the_plan(self) -> list[str]:
        """Whether the plan beats what nothing was measured for."""
        periodic = [o for o in self.others if o.offset is not None]
        if not periodic:
            return []
        best = min(periodic, key=lambda outcome: outcome.loss.mean)
        offset = f"offset {best.offset}"
        if best.full_attention_layers == self.hybrid.full_attention_layers:
            return [
                f"This plan is the periodic one at {offset}; the other offsets show what choosing "
                "by period risks."
            ]
        if best.loss_above(self.hybrid).clearly_positive:
            return []
        if self.hybrid.loss_above(best).clearly_positive:
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


@dataclass(frozen=True)
class ComparedPlan:
    """A plan beside others.

    Attributes:
        outcome: how it did.
        value: the objective, lower is better.
        layer_forwards: what choosing it would have cost by itself, 0 for a plan chosen without
            measuring.
    """

    outcome: Outcome
    value: float
    layer_forwards: float

    @property
    def layers(self) -> tuple[int, ...]:
        """Its full-attention layers."""
        return self.outcome.full_attention_layers


@dataclass(frozen=True)
class MethodComparison:
    """Plans by several methods on examples that none was chosen on.

    Attributes:
        keep: how many layers each plan keeps.
        entries: the plans; the one of the lowest objective wins, of equals the first.
        original: the full-attention model on the same examples.
    """

    keep: int
    entries: tuple[ComparedPlan, ...]
    original: Outcome

    @property
    def winner(self) -> str:
        """The name of the entry whose objective is lowest."""
        return min(self.entries, key=lambda entry: entry.value).outcome.name

    def entry(self, name: str) -> ComparedPlan:
        """The entry of that name."""
        return next(entry for entry in self.entries if entry.outcome.name == name)

    @property
    def _periodic(self) -> list[ComparedPlan]:
        return [entry for entry in self.entries if entry.outcome.offset is not None]

    def conclusion(self) -> str:
        """Whether measuring has paid, in a sentence."""
        winner = self.entry(self.winner)
        best = min(self._periodic, key=lambda entry: entry.value)
        if set(best.layers) == set(winner.layers):
            return (
                f"The winner keeps the layers of the best periodic plan ({best.outcome.name}): "
                "nothing beats choosing by period here, if one knew the offset."
            )
        difference = best.outcome.loss_above(winner.outcome)
        if difference.clearly_positive:
            return (
                f"The best periodic plan ({best.outcome.name}) loses {difference} more than the "
                "winner."
            )
        return (
            f"Nothing beats the best periodic plan ({best.outcome.name}) beyond doubt: it is "
            f"{difference} above the winner."
        )

    def to_json(self) -> dict[str, Any]:
        """As kept in the scores file; `from_json` reads it back."""
        winner = self.entry(self.winner).outcome
        return {
            "keep": self.keep,
            "winner": self.winner,
            "finding": self.conclusion(),
            "original": _outcome_json(self.original),
            "entries": [
                {
                    **_outcome_json(entry.outcome),
                    "value": entry.value,
                    "layer_forwards": entry.layer_forwards,
                    "nll_above_winner": asdict(entry.outcome.loss_above(winner)),
                    "answers_right": asdict(entry.outcome.accuracy),
                }
                for entry in self.entries
            ],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], total: int) -> MethodComparison:
        """Read what `to_json` gave.

        Raises:
            KeyError, TypeError, ValueError: it is no comparison on a model of `total` layers.
        """
        comparison = cls(
            keep=int(value["keep"]),
            entries=tuple(
                ComparedPlan(_outcome(entry), float(entry["value"]), float(entry["layer_forwards"]))
                for entry in value["entries"]
            ),
            original=_outcome(value["original"]),
        )
        comparison._check(total)
        return comparison

    def _check(self, total: int) -> None:
        """Raise ValueError unless the plans are of one size and were run on the same examples."""
        examples = len(self.original.nll)
        for outcome in (self.original, *(entry.outcome for entry in self.entries)):
            if not examples or {len(outcome.nll), len(outcome.correct)} != {examples}:
                raise ValueError(f"{outcome.name} was not run on the contest's examples")
        for entry in self.entries:
            layers = set(entry.layers) & set(range(total))
            if not len(layers) == len(entry.layers) == self.keep:
                raise ValueError(f"{entry.outcome.name} does not keep {self.keep} of the layers")
        if not self._periodic:
            raise ValueError("no periodic plan was in the contest")


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "name": outcome.name,
        "full_attention_layers": list(outcome.full_attention_layers),
        "nll": list(outcome.nll),
        "correct": list(outcome.correct),
    }


def _outcome(value: Mapping[str, Any]) -> Outcome:
    method, _, offset = str(value["name"]).partition(_OFFSET)
    return Outcome(
        method,
        tuple(int(layer) for layer in value["full_attention_layers"]),
        tuple(float(nll) for nll in value["nll"]),
        tuple(bool(right) for right in value["correct"]),
        int(offset) if offset else None,
    )
