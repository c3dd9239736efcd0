"""What plans cost in quality, on examples that no layer was chosen on."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from converter.common.statistics import FEWEST, Estimate, Share, estimate, share
from converter.plan.units import Units

# Files hold the name only.
_OFFSET = ", offset "
# What a plan is called there, of layers and of KV heads.
PLAN_KEYS = ("full_attention_layers", "full_kv_heads")


def is_periodic_name(name: str) -> bool:
    """Whether a plan of this name is one at an offset."""
    return _OFFSET in name


@dataclass(frozen=True)
class Outcome:
    """How a plan did on the held-out examples.

    Attributes:
        method: what chose the layers, or `original`, `hybrid` or `all sliding`.
        full: the layers that keep full attention; or their KV heads, by the numbers of `Units`.
        nll: answer NLL of each example, nats per token.
        correct: whether every answer token was the most likely one, by example.
        offset: the first full-attention layer of a periodic plan; None for any other.
        kv_heads: of each layer, where `full` tells them apart; 1 where it names layers.
    """

    method: str
    full: tuple[int, ...]
    nll: tuple[float, ...]
    correct: tuple[bool, ...]
    offset: int | None = None
    kv_heads: int = 1

    @property
    def name(self) -> str:
        """What the plan is called where it is shown."""
        return self.method if self.offset is None else f"{self.method}{_OFFSET}{self.offset}"

    @property
    def is_mixed(self) -> bool:
        """Whether a layer has KV heads that attend fully beside others that slide."""
        return not Units(0, self.kv_heads).are_whole_layers(self.full)

    @property
    def told(self) -> str:
        """What keeps full attention, in words."""
        return Units(0, self.kv_heads).told(self.full)

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
        sliding = next((o for o in self.others if not o.full), None)
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
            if best.full == self.hybrid.full:
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
                    **_plan_json(outcome),
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


@dataclass(frozen=True)
class MethodComparison:
    """Plans of `keep` full units by several methods on examples that none was chosen on.

    Of those that were run on the most examples the lowest objective wins; of equals the one that
    took most to choose, as it knows most of the layers, and then the first. A plan that mixes KV
    heads in a layer has to be clearly better than the best one of whole layers, which runs in more
    engines.
    """

    keep: int
    entries: tuple[ComparedPlan, ...]
    original: Outcome

    @property
    def units(self) -> Units:
        """What plans are of; of how many layers is not known here."""
        return Units(0, self.original.kv_heads)

    @property
    def ranked(self) -> tuple[ComparedPlan, ...]:
        """The entries, the winner first; those given up early come behind those that went on."""
        entries = sorted(self.entries, key=lambda one: -one.layer_forwards)
        return tuple(sorted(entries, key=lambda one: (-len(one.outcome.nll), one.value)))

    @property
    def winner(self) -> str:
        """The name of the entry that is chosen."""
        best = self.ranked[0].outcome
        if best.is_mixed:
            whole = next(one.outcome for one in self.ranked if not one.outcome.is_mixed)
            if not whole.loss_above(best).clearly_positive:
                return whole.name
        return best.name

    def entry(self, name: str) -> ComparedPlan:
        """The entry of that name."""
        return next(entry for entry in self.entries if entry.outcome.name == name)

    def conclusion(self) -> str:
        """Whether measuring has paid, and what was left undecided, in sentences."""
        winner = self.entry(self.winner)
        close = {
            entry.outcome.name: entry.outcome.loss_above(winner.outcome)
            for entry in self.ranked
            if entry.outcome.full != winner.outcome.full
        }
        left = [name for name, above in close.items() if not above.clearly_positive]
        undecided = f" Not clearly worse than the winner: {', '.join(left)}." if left else ""
        return self._against_periodic(winner) + self._against_layers(winner) + undecided

    def _against_layers(self, winner: ComparedPlan) -> str:
        """What telling KV heads apart has brought, where that was tried."""
        if winner.outcome.kv_heads == 1:
            return ""
        mixed, whole = (
            next((one.outcome for one in self.ranked if one.outcome.is_mixed == kind), None)
            for kind in (True, False)
        )
        if mixed is None or whole is None:
            return ""
        above = (
            f"the best plan of whole layers ({whole.name}) is {whole.loss_above(mixed)} above it"
        )
        if winner.outcome is mixed:
            return f" KV heads are worth telling apart: {above}."
        return f" KV heads are not clearly better, and run in fewer engines: {above}."

    def _against_periodic(self, winner: ComparedPlan) -> str:
        periodic = (entry for entry in self.entries if entry.outcome.offset is not None)
        best = min(periodic, key=lambda entry: self.ranked.index(entry))
        named = f"best periodic plan ({best.outcome.name})"
        difference = best.outcome.loss_above(winner.outcome)
        if best.outcome.full == winner.outcome.full:
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
    def from_json(
        cls, value: Mapping[str, Any], numbers: Collection[int], kv_heads: int = 1
    ) -> MethodComparison:
        """Read what `to_json` gave.

        Raises:
            KeyError, TypeError, ValueError: it is no comparison of plans about the layers, or KV
                heads, of these numbers.
        """

        def read(plan: Mapping[str, Any]) -> Outcome:
            return _outcome(plan, kv_heads)

        comparison = cls(
            keep=int(value["keep"]),
            entries=tuple(
                ComparedPlan(read(entry), float(entry["value"]), float(entry["layer_forwards"]))
                for entry in value["entries"]
            ),
            original=read(value["original"]),
        )
        plans, examples = [entry.outcome for entry in comparison.entries], comparison.original.nll
        for outcome in (comparison.original, *plans):
            if not 0 < len(outcome.nll) == len(outcome.correct) <= len(examples):
                raise ValueError(f"{outcome.name} was not run on the contest's examples")
        for outcome in plans:
            count = len(set(outcome.full) & set(numbers))
            # Of whole layers there may be room for fewer.
            least = comparison.keep - kv_heads + 1
            if not least <= count == len(outcome.full) <= comparison.keep:
                raise ValueError(f"{outcome.name} does not keep {comparison.keep} of them")
        if all(outcome.offset is None for outcome in plans):
            raise ValueError("no periodic plan was in the contest")
        return comparison


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    nll, correct = list(outcome.nll), list(outcome.correct)
    return {**_plan_json(outcome), "nll": nll, "correct": correct}


def _plan_json(outcome: Outcome) -> dict[str, Any]:
    return {"name": outcome.name, PLAN_KEYS[outcome.kv_heads > 1]: list(outcome.full)}


def _outcome(value: Mapping[str, Any], kv_heads: int) -> Outcome:
    method, _, offset = str(value["name"]).partition(_OFFSET)
    return Outcome(
        method,
        tuple(int(unit) for unit in value[PLAN_KEYS[kv_heads > 1]]),
        tuple(float(nll) for nll in value["nll"]),
        tuple(bool(right) for right in value["correct"]),
        int(offset) if offset else None,
        kv_heads,
    )
