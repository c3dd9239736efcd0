"""What a choice of layers is to minimise over examples of several kinds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum

MEAN, WORST = "mean", "worst"
OBJECTIVES = (MEAN, WORST)


@dataclass(frozen=True)
class Objective:
    """One number of many losses, lower is better.

    Attributes:
        name: `mean` of all examples, or `worst`: the kind of input that loses most against the
            full-attention model (minimax), by its mean.
    """

    name: str = MEAN

    @property
    def needs_full(self) -> bool:
        """Whether the full-attention model's losses are wanted."""
        return self.name == WORST

    def value(self, kinds: Sequence[str], losses: Sequence[float], full: Sequence[float]) -> float:
        """The number.

        Args:
            kinds: of each example.
            losses: answer NLL of each example, nats per token.
            full: the full-attention model's, where it is wanted.
        """
        if self.name == MEAN:
            return _mean(losses)
        lost: dict[str, list[float]] = {}
        for kind, loss, reference in zip(kinds, losses, full, strict=True):
            lost.setdefault(kind, []).append(loss - reference)
        return max(_mean(values) for values in lost.values())


def _mean(values: Sequence[float]) -> float:
    return fsum(values) / len(values)
