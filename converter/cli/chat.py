"""What `hybridize run` says and asks: single texts, and conversations at a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from converter.cli.console import Console
from converter.common.errors import HybridizeError, UsageError
from converter.common.units import human_bytes
from converter.inference.completion import SecondInterrupt, noting_interrupts

if TYPE_CHECKING:
    from converter.inference.completion import Completion, Turn

_SIGN = "> "
_HELP = (
    "/reset  forget the conversation\n"
    "/exit   leave, as Ctrl-D does\n"
    "/help   this list\n"
    "Ctrl-C stops an answer. A line that ends with \\ goes on in the next one."
)


@dataclass
class _Voice:
    """A model that answers, and the conversation as it has it."""

    name: str
    complete: Callable[..., Completion]
    turns: list[Turn] = field(default_factory=list)


class Conversation:
    """Texts for a model, and its answers as they come, with what they took.

    Args:
        prompt_of: writes a conversation as the model reads it.
        completers: what continues a text, by name; all of them answer.
        system: the instruction that a chat begins with.
    """

    def __init__(
        self,
        console: Console,
        prompt_of: Callable[[Sequence[Turn]], str],
        completers: Mapping[str, Callable[..., Completion]],
        system: str | None,
    ) -> None:
        self.console, self._prompt_of = console, prompt_of
        self._start: list[Turn] = [] if system is None else [{"role": "system", "content": system}]
        self._voices = [_Voice(name, complete) for name, complete in completers.items()]
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        for voice in self._voices:
            voice.turns = [*self._start]

    def complete(self, text: str) -> None:
        """Continue a text."""
        self._tell([self._give(voice, text, is_chat=False) for voice in self._voices])

    def ask(self, text: str) -> bool:
        """Give each voice's answer in its conversation, as far as the user lets it come.

        Returns:
            Whether the user stopped one. A turn that got no answer is forgotten.

        Raises:
            HybridizeError: the template refuses it, or it does not fit the context.
        """
        done = []
        for voice in self._voices:
            turns = [*voice.turns, {"role": "user", "content": text}]
            with noting_interrupts(only_if=True) as interrupted:
                request = self._prompt_of(turns)
            if interrupted():
                return True
            answer = self._give(voice, request, is_chat=True)
            if answer.text or not answer.interrupted:
                voice.turns = [*turns, {"role": "assistant", "content": answer.text}]
            done.append(answer)
        return self._tell(done)

    def _give(self, voice: _Voice, request: str, *, is_chat: bool) -> Completion:
        console = self.console
        streams = not console.json_output
        if streams and len(self._voices) > 1:
            console.stream(f"{voice.name}: ")
        done = voice.complete(
            request, is_chat=is_chat, show=console.stream if streams else lambda _piece: None
        )
        if streams:
            console.stream("\n")
        console.say(_figures(done))
        return done

    def _tell(self, done: list[Completion]) -> bool:
        values = [
            asdict(one) | {"decode_tokens_per_second": one.decode_tokens_per_second} for one in done
        ]
        value, *others = values
        named = dict(zip((voice.name for voice in self._voices[1:]), others, strict=True))
        self.console.result(value | named, lambda: None)
        return any(one.interrupted for one in done)


def _figures(done: Completion) -> str:
    speed = done.decode_tokens_per_second
    return (
        f"{done.prompt_tokens} prompt tokens in {done.prefill_seconds:.2f} s "
        f"({done.prompt_tokens / max(done.prefill_seconds, 1e-9):.0f} tokens/s), "
        f"{done.new_tokens} new"
        + (f" at {speed:.1f} tokens/s" if speed is not None else "")
        + f"; KV cache {human_bytes(done.cache_bytes)}"
        + f" instead of {human_bytes(done.full_cache_bytes)}"
        * (done.cache_bytes != done.full_cache_bytes)
    )


def converse(conversation: Conversation) -> None:
    """Answer each line of standard input, which at a terminal is asked for.

    Raises:
        KeyboardInterrupt: the user stopped an answer to what is no terminal, or did so twice.
    """
    if sys.stdin.isatty():
        _at_terminal(conversation)
        return
    for line in sys.stdin:
        if line.strip() and conversation.ask(as_utf8(line.strip())):
            raise KeyboardInterrupt


def _at_terminal(conversation: Conversation) -> None:
    # Where it is there, lines can be edited and called back.
    with suppress(ImportError):
        import readline  # noqa: F401

    conversation.console.say("/help lists commands; Ctrl-C stops an answer, Ctrl-D leaves")
    while True:
        try:
            text = as_utf8(_typed()).strip()
            if text == "/exit":
                return
            if text == "/reset":
                conversation.reset()
            elif text == "/help":
                conversation.console.say(_HELP)
            elif text:
                conversation.ask(text)
        except HybridizeError as error:
            print(f"error: {error}", file=sys.stderr)  # noqa: T201
        except SecondInterrupt:
            raise
        except KeyboardInterrupt:
            # Right before an answer or behind it.
            conversation.console.stream("\n")
        except EOFError:
            conversation.console.stream("\n")
            return


def _typed() -> str:
    """What the user types at the sign, lines that end with a backslash together.

    Raises:
        EOFError: there is no more.
    """
    lines: list[str] = []
    while not lines or lines[-1].endswith("\\"):
        try:
            lines.append(_line())
        except KeyboardInterrupt:
            print(file=sys.stderr)  # noqa: T201 - as shells do: what was typed is dropped
            lines = []
    return "\n".join(line.removesuffix("\\") for line in lines)


def _line() -> str:
    if sys.stdout.isatty():
        return input(_SIGN)
    # The sign is no part of the result.
    print(_SIGN, end="", file=sys.stderr, flush=True)  # noqa: T201
    return input()


def as_utf8(text: str) -> str:
    """The text, refused when it came from bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError("the prompt is not UTF-8 text", where="prompt") from error
    return text
