"""Running a GGUF of ours in llama.cpp: streamed text, and what it took."""

from __future__ import annotations

import codecs
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from converter.common.errors import GgufError, UsageError
from converter.engines.gguf.hybrid_file import HybridFile, open_hybrid
from converter.engines.gguf.llama_cpp import CACHE_PADDING, LlamaCppSettings
from converter.engines.gguf.process import LlamaCppProcess
from converter.engines.gguf.sampling import sampling_of
from converter.inference.completion import (
    Completion,
    GenerationSettings,
    StoppingText,
    Turn,
    noting_interrupts,
)
from converter.inference.tokenizer import rendered
from converter.model.families.stock_gguf import number_of

# Share of the memory that is left beside the weights which a context may take; the rest is for
# llama.cpp's own buffers and for everything else on the machine.
_CACHE_SHARE = 0.5


class GgufRunner:
    """A loaded file; use it as a context manager.

    Args:
        settings: how to continue a text; what is not said of drawing tokens, the file may say.
        context_tokens: room for prompt and answer; None takes the model's, or what memory allows.
        warn: is told what the user must know before believing the text.

    Raises:
        GgufError: the file is damaged, is not ours, or llama.cpp does not load it.
        UsageError: the context asked for cannot be had.
    """

    def __init__(
        self,
        path: Path,
        settings: GenerationSettings,
        *,
        context_tokens: int | None = None,
        warn: Callable[[str], None],
    ) -> None:
        self._wanted = settings
        self._file = open_hybrid(path)
        if not self._file.honoured:
            warn(
                f"warning: llama.cpp ignores the plan under {self._file.container.arch}: "
                "this is the original, with full attention"
            )
        self._settings = LlamaCppSettings(
            _context(self._file, context_tokens),
            sampling=sampling_of(self._file.container.metadata, settings),
        )
        self._model = LlamaCppProcess(path, self._settings, warn)

    def __enter__(self) -> GgufRunner:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """End llama.cpp."""
        self._model.close()

    @property
    def context_tokens(self) -> int:
        """Room for prompt and answer."""
        return self._settings.context_tokens

    def prompt_of(self, turns: Sequence[Turn]) -> str:
        """A conversation by the template in the file.

        Raises:
            UsageError: it has none.
            SourceError: it has one that fails.
        """
        template = self._file.container.metadata.get("tokenizer.chat_template")
        if template is None or template.kind != "string":
            raise UsageError(
                "this file has no chat template",
                where="--chat",
                next_step="leave --chat out and give the text to continue",
            )
        specials = {f"{name}_token": self._special(name) for name in ("bos", "eos")}
        return rendered(template.value, turns, specials, self._file.path)

    def _special(self, name: str) -> str:
        metadata = self._file.container.metadata
        index = number_of(metadata, f"tokenizer.ggml.{name}_token_id", -1)
        tokens = metadata.get("tokenizer.ggml.tokens")
        if tokens is None or tokens.kind != "array" or index not in range(len(tokens.value)):
            return ""
        return str(tokens.value[index])

    def complete(self, prompt: str, *, is_chat: bool, show: Callable[[str], None]) -> Completion:
        """Continue a text from an empty cache, handing over pieces as they come.

        An interrupt ends an answer in a chat, which counts as far as it came.

        Args:
            is_chat: `prompt_of` made the text: its special tokens are written already.

        Raises:
            UsageError: the prompt is empty, or does not fit.
        """
        with noting_interrupts(only_if=is_chat) as interrupted:
            return self._complete(prompt, show, interrupted, is_chat=is_chat)

    def _complete(
        self,
        prompt: str,
        show: Callable[[str], None],
        interrupted: Callable[[], bool],
        *,
        is_chat: bool,
    ) -> Completion:
        ids = self._model.tokenize(prompt, around=not is_chat)
        if not 0 < len(ids) < self.context_tokens:
            raise UsageError(
                "the prompt cannot be used",
                where="prompt",
                expected=f"1 to {self.context_tokens - 1} tokens",
                got=f"{len(ids)} tokens",
                next_step="give a larger --context" if ids else None,
            )
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        shown: list[str] = []

        def take(piece: str) -> None:
            shown.append(piece)
            show(piece)

        text = StoppingText(self._wanted.stop, take)
        room = min(self._wanted.max_new_tokens, self.context_tokens - len(ids))
        self._model.clear()
        times = [time.perf_counter()]
        token = self._first_token(ids, interrupted)
        while token is not None:
            times.append(time.perf_counter())
            # The token that ends an answer has no text, but is one.
            ended = self._model.ends(token)
            text.add(decoder.decode(b"" if ended else self._model.piece(token)))
            if ended or text.stopped or interrupted() or len(times) > room:
                break
            token = self._model.next_token([token])
        text.add(decoder.decode(b"", final=True))
        text.end()
        started, *came = times
        first, last = (came[0], came[-1]) if came else (time.perf_counter(),) * 2
        return Completion(
            text="".join(shown),
            prompt_tokens=len(ids),
            new_tokens=len(came),
            prefill_seconds=first - started,
            decode_seconds=last - first,
            # What llama.cpp made, by the cells and layers that it reports.
            cache_bytes=self._file.cache_bytes(self._settings, self._model.caches),
            full_cache_bytes=self._file.cache_bytes(
                self._settings, [(self._settings.full_cells, self._file.sizes.layers)]
            ),
            interrupted=interrupted(),
        )

    def _first_token(self, ids: Sequence[int], interrupted: Callable[[], bool]) -> int | None:
        """The token after a prompt, read a batch at a time; None where it is interrupted."""
        step = self._settings.batch_tokens
        last = (len(ids) - 1) // step * step
        for start in range(0, last, step):
            self._model.feed(ids[start : start + step], [])
            if interrupted():
                return None
        return self._model.next_token(ids[last:])


def _context(file: HybridFile, asked: int | None) -> int:
    """How many tokens of context to make room for."""
    if asked is not None:
        if asked > file.context_tokens:
            raise UsageError(
                "the model was not made for so long a context",
                where="--context",
                expected=f"at most {file.context_tokens} tokens",
                got=asked,
            )
        room = _left_memory(file)
        if file.context_bytes(LlamaCppSettings(asked)) > room:
            raise UsageError(
                "there is too little memory for so long a context",
                where="--context",
                expected=f"at most {fitting_context(file, room)} tokens",
                got=asked,
            )
        return asked
    return fitting_context(file, int(_left_memory(file) * _CACHE_SHARE))


def _left_memory(file: HybridFile) -> int:
    available: int = psutil.virtual_memory().available
    return available - file.weight_bytes


def fitting_context(file: HybridFile, room: int) -> int:
    """The longest context, up to the model's own, that takes at most `room` bytes.

    Raises:
        GgufError: not even the shortest one fits.
    """

    def needed(context_tokens: int) -> int:
        return file.context_bytes(LlamaCppSettings(context_tokens))

    if needed(file.context_tokens) <= room:
        return file.context_tokens
    contexts = range(CACHE_PADDING, file.context_tokens + 1, CACHE_PADDING)
    fitting = bisect_right(contexts, room, key=needed)
    if not fitting:
        raise GgufError(
            "there is too little memory to run this file",
            where=file.path,
            expected=f"{file.weight_bytes:,} bytes of weights and a cache beside them",
            next_step="close other programs, give a --context, or export a smaller --type",
        )
    return fitting * CACHE_PADDING
