"""How gates are learned."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GateSettings:
    """How gates are learned.

    Attributes:
        steps: of Adam.
        learning_rate: of Adam, in gates (`learn_gates`) or in log odds (`learn_budgeted_gates`).
        seed: of what is drawn.
    """

    steps: int
    learning_rate: float
    seed: int = 0
