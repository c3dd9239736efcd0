"""What plans cost in quality, on examples that no layer was chosen on."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from converter.common.statistics import FEWEST, Estimate, Share, estimate, share

# Files hold the name only.
_OFFSET = ", offset "


def is_periodic_name(name: str) -> bool:
    """Whether a plan of this name is one at an offset."""
    return _OFFSET in name


@dataclass(frozen=True)
class Outcome:
    """How a plan did on the held-out examples.

    Attributes:
        method: what chose the layers, or `original`, `hybrid` or `all sliding`.
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
        """What the plan is called where it is shown."""
        return self.method if self.offset is None else f"{self.method}{_OFFSET}{self.offset}"

    @property
    def loss(self) -> Estimate:
        """Mean answer NLL with its standard error."""
        return estimate(self.nll)

    @property
    def accuracy(self) -> Share:
        """Share of answers that greedy decoding gets right, with its 95% interval."""
        return share(sum(self.correct), len(self.correct))

    def loss_above(self, other: Outcome) -> Estimate:
        """Paired difference of answer NLL to another outcome, on the examples both were run on.

        Those are the first ones of whichever was run on more.
        """
        return estimate([a - b for a, b in zip(self.nll, other.nll, strict=False)])


@dataclass(frozen=True)
class Quality:
    """The original, the hybrid and the plans it is compared with, on the same examples.

    Attributes:
        asked: how many examples were asked for.
    """

    original: Outcome
    hybrid: Outcome
    others: tuple[Outcome, ...]
    asked: int | None = None

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """All of them, the original first."""
        return (self.original, self.hybrid, *self.others)

    def findings(self) -> list[str]:
        """What the numbers say, and what they do not, in sentences."""
        said = []
        sliding = next((o for o in self.others if not o.full_attention_layers), None)
        if sliding and not (lost := sliding.loss_above(self.original)).clearly_positive:
            said.append(
                f"With every layer sliding the model loses {lost} on these examples. "
                + (
                    "They hardly need long range: the scores are close to noise; choose data "
                    "whose answers depend on something far away."
                    if any(self.original.correct)
                    else f"But the original itself gives none of the {len(self.original.nll)} "
                    "answers right, so it is the task that it cannot do, and the scores say "
                    "nothing of long range; choose data that this model answers."
                )
            )
        periodic = [outcome for outcome in self.others if outcome.offset is not None]
        if periodic:
            best = min(periodic, key=lambda outcome: outcome.loss.mean)
            ahead, behind = best.loss_above(self.hybrid), self.hybrid.loss_above(best)
            if best.full_attention_layers == self.hybrid.full_attention_layers:
                said.append(
                    f"This plan is the periodic one at offset {best.offset}; the other offsets "
                    "show what choosing by period risks."
                )
            elif len(best.nll) < FEWEST:
                said.append(
                    f"{len(best.nll)} examples are too few to tell this plan from the best "
                    f"periodic one (offset {best.offset}), which is {ahead} above it."
                )
            elif behind.clearly_positive:
                said.append(
                    f"The periodic plan at offset {best.offset}, chosen without measuring, does "
                    f"better than this one, by {behind}."
                )
            elif not ahead.clearly_positive:
                said.append(
                    f"The best periodic plan (offset {best.offset}) is {ahead} above this one: "
                    "no clear difference."
                )
        return said

    def to_json(self) -> dict[str, Any]:
        """As saved in the checkpoint."""
        return {
            "examples": len(self.original.nll),
            "examples_asked": self.asked,
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
    """Plans of `keep` full layers by several methods on examples that none was chosen on.

    Of those that were run on the most examples the lowest objective wins; of equals the one that
    took most to choose, as it knows most of the layers, and then the first.
    """

    keep: int
    entries: tuple[ComparedPlan, ...]
    original: Outcome

    @property
    def ranked(self) -> tuple[ComparedPlan, ...]:
        """The entries, the winner first; those given up early come behind those that went on."""
        entries = sorted(self.entries, key=lambda one: -one.layer_forwards)
        return tuple(sorted(entries, key=lambda one: (-len(one.outcome.nll), one.value)))

    @property
    def winner(self) -> str:
        """The name of the entry that is chosen."""
        return self.ranked[0].outcome.name

    def entry(self, name: str) -> ComparedPlan:
        """The entry of that name."""
        return next(entry for entry in self.entries if entry.outcome.name == name)

    def conclusion(self) -> str:
        """Whether measuring has paid, and what was left undecided, in sentences."""
        winner = self.ranked[0]
        close = {
            entry.outcome.name: entry.outcome.loss_above(winner.outcome)
            for entry in self.ranked
            if set(entry.layers) != set(winner.layers)
        }
        left = [name for name, above in close.items() if not above.clearly_positive]
        undecided = f" Not clearly worse than the winner: {', '.join(left)}." if left else ""
        return self._against_periodic(winner) + undecided

    def _against_periodic(self, winner: ComparedPlan) -> str:
        periodic = (entry for entry in self.entries if entry.outcome.offset is not None)
        best = min(periodic, key=lambda entry: self.ranked.index(entry))
        named = f"best periodic plan ({best.outcome.name})"
        difference = best.outcome.loss_above(winner.outcome)
        if set(best.layers) == set(winner.layers):
            return (
                f"The winner keeps the layers of the {named}: "
                "nothing beats choosing by period here, if one knew the offset."
            )
        if difference.clearly_positive and len(winner.outcome.nll) >= FEWEST:
            return f"The {named} loses {difference} more than the winner."
        return f"Nothing beats the {named} beyond doubt: it is {difference} above the winner."

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
    def from_json(cls, value: Mapping[str, Any], layers: Collection[int]) -> MethodComparison:
        """Read what `to_json` gave.

        Raises:
            KeyError, TypeError, ValueError: it is no comparison of plans about these layers.
        """
        comparison = cls(
            keep=int(value["keep"]),
            entries=tuple(
                ComparedPlan(_outcome(entry), float(entry["value"]), float(entry["layer_forwards"]))
                for entry in value["entries"]
            ),
            original=_outcome(value["original"]),
        )
        plans, examples = [entry.outcome for entry in comparison.entries], comparison.original.nll
        for outcome in (comparison.original, *plans):
            if not 0 < len(outcome.nll) == len(outcome.correct) <= len(examples):
                raise ValueError(f"{outcome.name} was not run on the contest's examples")
        for outcome in plans:
            kept = outcome.full_attention_layers
            if not len(set(kept) & set(layers)) == len(kept) == comparison.keep:
                raise ValueError(f"{outcome.name} does not keep {comparison.keep} of the layers")
        if all(outcome.offset is None for outcome in plans):
            raise ValueError("no periodic plan was in the contest")
        return comparison


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
