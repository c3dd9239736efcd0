"""What every engine that continues a text is asked, and what it answers."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

Turn = dict[str, str]


@dataclass(frozen=True)
class GenerationSettings:
    """How to continue a text.

    How tokens are drawn is the model's own generation settings' matter where nothing is said, and
    where they say nothing either, the most likely one is taken.

    Attributes:
        max_new_tokens: new tokens, at most.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw from so many most likely tokens; 0 from all.
        top_p: draw from the most likely tokens that together have this probability.
        min_p: leave out tokens less likely than this share of the likeliest one's probability.
        seed: of the drawing, for each text anew.
        stop: texts that end an answer and do not belong to it.
    """

    max_new_tokens: int
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Completion:
    """What one request gave and took.

    Attributes:
        prefill_seconds: until the first new token.
        decode_seconds: from the first new token to the last.
        cache_bytes: keys and values held at the end.
        full_cache_bytes: what full attention in every layer would hold.
        interrupted: the user stopped it.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    cache_bytes: int
    full_cache_bytes: int
    interrupted: bool = False

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Speed after the first token; None when there was no second one."""
        later = self.new_tokens - 1
        return later / max(self.decode_seconds, 1e-9) if later > 0 else None


class StoppingText:
    """Text that comes in pieces and is shown up to a stop text, which is not.

    Args:
        stop: texts that end it.
        show: takes what is certain not to begin a stop text.

    Attributes:
        stopped: whether a stop text has come.
    """

    def __init__(self, stop: tuple[str, ...], show: Callable[[str], None]) -> None:
        self._stop, self._show = stop, show
        self._held, self.stopped = "", False

    def add(self, piece: str) -> None:
        """Take the next piece; nothing counts after a stop text."""
        if self.stopped:
            return
        text = self._held + piece
        whole = before_stop(text, self._stop)
        self.stopped = len(whole) < len(text)
        certain = whole
        if not self.stopped:
            # A stop text may have begun.
            begun = (len(s) for stop in self._stop if (s := _beginning_at_end(text, stop)))
            certain = text[: len(text) - max(begun, default=0)]
        self._held = text[len(certain) :]
        self._show(certain)

    def end(self) -> None:
        """Show what was held back for a stop text that did not come."""
        if not self.stopped:
            self._show(self._held)


def _beginning_at_end(text: str, stop: str) -> str:
    """The longest true beginning of a stop text that the text ends with."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((stop[:n] for n in lengths if text.endswith(stop[:n])), "")


def before_stop(text: str, stop: tuple[str, ...]) -> str:
    """A text up to the first of its stop texts."""
    return text[: min((at for one in stop if (at := text.find(one)) >= 0), default=len(text))]


class SecondInterrupt(KeyboardInterrupt):
    """The user does not wait for the end in order; what was under way cannot be gone on with."""


@contextmanager
def noting_interrupts(*, only_if: bool) -> Iterator[Callable[[], bool]]:
    """Whether there was an interrupt, for work that must come to an end in order.

    A second interrupt is raised; every one is where they are not to be noted, and outside the main
    thread, which alone receives signals.

    Raises:
        SecondInterrupt: there were two.
    """
    noted = False

    def note(_signal: int, _frame: object) -> None:
        nonlocal noted
        if noted:
            raise SecondInterrupt
        noted = True

    if not only_if or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)
