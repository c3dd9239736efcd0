"""The errors a user can cause.

HybridizeError
├── UsageError          an option, recipe or setting that makes no sense
├── SourceError         the model to convert cannot be used
│   ├── FamilyError     its architecture is not supported, or not in this variant
│   ├── PickledWeightsError
│   └── ChatTemplateError   its chat template refuses a conversation
├── DataError           calibration data that cannot be used
├── PlanError           a plan or budget that cannot be built, read or honoured
├── ScoresError         a scores file or result log that does not fit what is asked
├── CheckpointError     a folder that is not a checkpoint of ours, or is damaged
├── GgufError           a GGUF file that is damaged, or that cannot be made or run as asked
├── HubError            the Hub refuses, fails or cannot be reached
└── OutputError         the result cannot be written where it was asked for

Library code raises these; only `converter.cli` turns them into a message and exit status 2.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_LONGEST_REASON = 300
# A full disk, and a reader of our output that went away.
_NOT_THE_FILES_FAULT = (errno.ENOSPC, errno.EDQUOT, errno.EPIPE)
# How torch says on its devices that memory is full; only for CUDA has it a class of its own.
_MEMORY_IS_FULL = ("out of memory", "can't allocate memory", "alloc_failed")


class HybridizeError(Exception):
    """A problem that the user can mend, told in one message.

    Args:
        problem: what is wrong, as one sentence without a final period.
        where: the file, key or option it is wrong in.
    """

    def __init__(
        self,
        problem: str,
        *,
        where: object = None,
        expected: object = None,
        got: object = None,
        next_step: str | None = None,
    ) -> None:
        self.problem = problem
        said = {"where": where, "expected": expected, "got": got, "next step": next_step}
        self.details = {name: str(value) for name, value in said.items() if value is not None}
        super().__init__(problem)

    def __str__(self) -> str:
        lines = [self.problem, *(f"  {name}: {value}" for name, value in self.details.items())]
        return "\n".join(lines)


class UsageError(HybridizeError):
    """An option, recipe or setting that makes no sense."""


class SourceError(HybridizeError):
    """The model to convert cannot be used."""


class FamilyError(SourceError):
    """The model's architecture is not supported, or not in this variant."""


class PickledWeightsError(SourceError):
    """The weights are pickles, which run code when they are read."""


class ChatTemplateError(SourceError):
    """The model's chat template refuses a conversation."""


class DataError(HybridizeError):
    """Calibration data that cannot be used."""


class PlanError(HybridizeError):
    """A plan or budget that cannot be built, read or honoured."""


class ScoresError(HybridizeError):
    """A scores file or result log that does not fit what is asked."""


class CheckpointError(HybridizeError):
    """A folder that is not a checkpoint of ours, or is damaged."""


class GgufError(HybridizeError):
    """A GGUF file that is damaged, or that cannot be made or run as asked."""


class HubError(HybridizeError):
    """The Hub refuses, fails or cannot be reached."""


class OutputError(HybridizeError):
    """The result cannot be written where it was asked for."""


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """The question whether the known word that is nearest was meant; None where none is near."""
    nearest = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {nearest[0]}?" if nearest else None


def says_memory_is_full(error: BaseException) -> bool:
    """Whether a library's error is about the memory of a device, whatever it was doing."""
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in said for words in _MEMORY_IS_FULL)


@contextmanager
def refusing(
    problem: str, where: object, error: type[HybridizeError], copy: object = None
) -> Iterator[None]:
    """Turn whatever is raised while a foreign file is read into one refusal.

    What libraries raise for values that they did not expect is of every type there is; a panic of
    Rust code (tokenizers) is no Exception even.

    Args:
        problem, where: as `HybridizeError` has them.
        error: what to raise.
        copy: what is read in the place of `where`, if it is not that, which the user never named.

    Raises:
        error: anything was raised but our own errors, the user's interruption, and what is no
            fault of the file: a full disk, or a device's full memory.
    """
    try:
        yield
    except (HybridizeError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as cause:
        if isinstance(cause, OSError) and cause.errno in _NOT_THE_FILES_FAULT:
            raise
        if says_memory_is_full(cause):
            raise
        said, kind = " ".join(str(cause).split()), type(cause).__name__
        if copy is not None:
            said = said.replace(str(copy), str(where))
        # A missing key's message is the key.
        said = f"{kind}: {said}" if isinstance(cause, KeyError) else said or kind
        got = said if len(said) <= _LONGEST_REASON else f"{said[:_LONGEST_REASON]}…"
        raise error(problem, where=where, got=got) from cause
