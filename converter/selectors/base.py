"""What a way of choosing layers has to say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from converter.mask import SLIDING


@dataclass(frozen=True)
class MeasuredSelector:
    """A selector that scores each layer by switching it in a uniform model.

    Attributes:
        name: what `--method` calls it.
        summary: one line for help and cards.
        others: the kind of every layer but the switched one, which has the other kind.
        score: from the mean answer NLL with all layers `others`, and with one switched, how much
            that layer deserves full attention.
    """

    name: str
    summary: str
    others: str
    score: Callable[[float, float], float]

    def variant(self, layer: int, total: int) -> list[int]:
        """The full-attention layers when one layer is switched."""
        if self.others == SLIDING:
            return [layer]
        return [other for other in range(total) if other != layer]


def rank(scores: list[float]) -> tuple[int, ...]:
    """Layer indices by descending score; equal scores keep the order of the layers."""
    return tuple(sorted(range(len(scores)), key=lambda i: (-scores[i], i)))
