"""How gates are learned, and how far their learning has come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import fsum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from converter.forward.gradient import GateGradients, Gates


class Oracle(Protocol):
    """Says what the gates do to the loss."""

    def __call__(self, step: int, gates: Gates) -> GateGradients:
        """The loss and its derivatives at these gates, on the examples of a step.

        Equal arguments must give equal results, or a run that is continued is another one.
        """


@dataclass(frozen=True)
class GateSettings:
    """How gates are learned.

    Attributes:
        steps: of Adam.
        learning_rate: of Adam, in gates (`learn_gates`) or in log odds (`learn_budgeted_gates`).
        batch: examples of a step.
        seed: of the draws of examples and of gates.
    """

    steps: int
    learning_rate: float
    batch: int
    seed: int = 0


# What finds the bundled model's layers in half a minute of one core, from hidden states at a
# sparsity of 0.4, and from the NLL at a rise of 0.01.
SPARSE, SPARSITY = GateSettings(steps=60, learning_rate=0.05, batch=8), 0.4
BUDGETED, RISE = GateSettings(steps=320, learning_rate=0.06, batch=2), 0.01


@dataclass(frozen=True)
class GateState:
    """What learning goes on from; plain numbers, so that a file can hold it exactly.

    Attributes:
        step: how many steps have been made.
        parameters: what Adam moves: the gates, or the log odds that they are open; a row a layer.
        first_moments, second_moments: Adam's, for each parameter.
        multipliers: of the budget, linear and quadratic; 0 where there is none.
        loss: of the last step, without penalties; None before the first.
    """

    step: int
    parameters: Gates
    first_moments: Gates
    second_moments: Gates
    multipliers: tuple[float, float] = (0.0, 0.0)
    loss: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; floats come back the same."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> GateState:
        """Read what `to_json` gave, also after a way through a file."""
        tables = ("parameters", "first_moments", "second_moments")
        gates = {name: tuple(map(tuple, value[name])) for name in tables}
        return cls(**{**value, **gates, "multipliers": tuple(value["multipliers"])})


def start_state(shape: tuple[int, int], parameter: float) -> GateState:
    """Before the first step.

    Args:
        shape: layers, and gates of each.
        parameter: of every gate.
    """
    layers, width = shape
    zeros = ((0.0,) * width,) * layers
    return GateState(0, ((parameter,) * width,) * layers, zeros, zeros)


def layer_values(gates: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """One value for each layer: the mean over its gates."""
    return tuple(fsum(row) / len(row) for row in gates)
