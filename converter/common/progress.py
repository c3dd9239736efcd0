"""How long work shows how far it is; `converter.cli.console` draws it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol


class Bar(Protocol):
    """Shows how far a piece of work is."""

    def advance(self, amount: float) -> None:
        """So much has been done."""

    def expect(self, amount: float) -> None:
        """So much is still to do."""


@dataclass(frozen=True)
class Stage:
    """A part of a measurement with a bar of its own title, and what it costs at most."""

    title: str
    layer_forwards: float


# Opens a bar for a title and an amount of work; see `converter.cli.console`.
Progress = Callable[[str, float], AbstractContextManager[Bar]]


class _Unseen:
    """A bar that nobody sees."""

    def advance(self, amount: float) -> None:
        """So much has been done."""

    def expect(self, amount: float) -> None:
        """So much is still to do."""


def unseen(_title: str, _amount: float) -> AbstractContextManager[Bar]:
    """Progress that is not shown."""
    return nullcontext(_Unseen())


def quiet_libraries() -> None:
    """Keep transformers' bars and notices out of our own talk; its errors still pass."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
