"""A contest: plans of the same size on examples that none of them was chosen on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from converter.calibration.results import Outcome
from converter.calibration.selectors.periodic import PERIODIC


@dataclass(frozen=True)
class Entry:
    """A plan in a contest.

    Attributes:
        outcome: how it did; its name is the selector's.
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
class Contest:
    """Who was in it and how they did; no entry did better on these examples than the winner.

    Attributes:
        keep: how many layers each plan keeps.
        entries: the plans; of equals the first wins.
        original: the full-attention model on the same examples.
    """

    keep: int
    entries: tuple[Entry, ...]
    original: Outcome

    @property
    def winner(self) -> str:
        """The name of the entry whose objective is lowest."""
        return min(self.entries, key=lambda entry: entry.value).outcome.name

    def entry(self, name: str) -> Entry:
        """The entry of that name."""
        return next(entry for entry in self.entries if entry.outcome.name == name)

    @property
    def _periodic(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.outcome.name.startswith(PERIODIC.name)]

    def finding(self) -> str:
        """Whether measuring has paid, in a sentence."""
        winner = self.entry(self.winner)
        best = min(self._periodic, key=lambda entry: entry.value)
        if set(best.layers) == set(winner.layers):
            return (
                f"The winner keeps the layers of the best periodic plan ({best.outcome.name}): "
                "nothing beats choosing by period here, if one knew the offset."
            )
        difference = best.outcome.loss_above(winner.outcome)
        if difference.stderr is not None and difference.mean > 2 * difference.stderr:
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
            "finding": self.finding(),
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
    def from_json(cls, value: Mapping[str, Any], total: int) -> Contest:
        """Read what `to_json` gave.

        Raises:
            KeyError, TypeError, ValueError: it is no contest of a model of `total` layers.
        """
        contest = cls(
            keep=int(value["keep"]),
            entries=tuple(
                Entry(_outcome(entry), float(entry["value"]), float(entry["layer_forwards"]))
                for entry in value["entries"]
            ),
            original=_outcome(value["original"]),
        )
        contest._check(total)
        return contest

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
    return Outcome(
        str(value["name"]),
        tuple(int(layer) for layer in value["full_attention_layers"]),
        tuple(float(nll) for nll in value["nll"]),
        tuple(bool(right) for right in value["correct"]),
    )
