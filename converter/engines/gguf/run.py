"""Running a GGUF of ours in llama.cpp: streamed text, and what it took."""

from __future__ import annotations

import codecs
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import psutil
from numpy.typing import NDArray

from converter.common.errors import GgufError, UsageError
from converter.engines.gguf.hybrid_file import HybridFile, open_hybrid
from converter.engines.gguf.llama_cpp import CACHE_PADDING, LlamaCppSettings
from converter.engines.gguf.process import LlamaCppProcess
from converter.inference.generate import Completion, Turn
from converter.inference.tokenizer import rendered
from converter.model.families.stock_gguf import number_of

# Share of the memory that is left beside the weights which a context may take; the rest is for
# llama.cpp's own buffers and for everything else on the machine.
_CACHE_SHARE = 0.5


class GgufRunner:
    """A loaded file; use it as a context manager.

    Args:
        temperature: 0 takes the most likely token; above 0 samples.
        context_tokens: room for prompt and answer; None takes the model's, or what memory allows.
        warn: is told what the user must know before believing the text.

    Raises:
        GgufError: the file is damaged, is not ours, or llama.cpp does not load it.
        UsageError: the context asked for cannot be had.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        context_tokens: int | None = None,
        warn: Callable[[str], None],
    ) -> None:
        self._max_new_tokens, self._temperature, self._seed = max_new_tokens, temperature, seed
        self._file = open_hybrid(path)
        if not self._file.honoured:
            warn(
                f"warning: llama.cpp ignores the plan under {self._file.container.arch}: "
                "this is the original, with full attention"
            )
        self._settings = LlamaCppSettings(_context(self._file, context_tokens))
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

        Args:
            is_chat: `prompt_of` made the text: its special tokens are written already.

        Raises:
            UsageError: the prompt is empty, or does not fit.
        """
        ids = self._model.tokenize(prompt, specials=True, around=not is_chat)
        if not 0 < len(ids) < self.context_tokens:
            raise UsageError(
                "the prompt cannot be used",
                where="prompt",
                expected=f"1 to {self.context_tokens - 1} tokens",
                got=f"{len(ids)} tokens",
                next_step="give a larger --context" if ids else None,
            )
        choose = self._chooser()
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text, new = "", 0
        self._model.clear()
        started = time.perf_counter()
        token = choose(self._model.feed(ids, [len(ids) - 1])[0])
        first = last = time.perf_counter()
        room = min(self._max_new_tokens, self.context_tokens - len(ids))
        while True:
            new, last = new + 1, time.perf_counter()
            # The token that ends an answer has no text, but is one.
            ended = self._model.ends(token)
            piece = decoder.decode(b"" if ended else self._model.piece(token))
            text += piece
            show(piece)
            if ended or new >= room:
                break
            token = choose(self._model.feed([token], [0])[0])
        rest = decoder.decode(b"", final=True)
        show(rest)
        return Completion(
            text=text + rest,
            prompt_tokens=len(ids),
            new_tokens=new,
            prefill_seconds=first - started,
            decode_seconds=last - first,
            # What llama.cpp made, by the cells and layers that it reports.
            cache_bytes=self._file.cache_bytes(self._settings, self._model.caches),
            full_cache_bytes=self._file.cache_bytes(
                self._settings, [(self._settings.full_cells, self._file.sizes.layers)]
            ),
        )

    def _chooser(self) -> Callable[[NDArray[Any]], int]:
        """The most likely token, or one drawn with its probability at the temperature."""
        if self._temperature == 0:
            return lambda logits: int(logits.argmax())
        generator = numpy.random.default_rng(self._seed)

        def draw(logits: NDArray[Any]) -> int:
            scaled = logits.astype(numpy.float64) / self._temperature
            weights = numpy.exp(scaled - scaled.max())
            return int(generator.choice(len(weights), p=weights / weights.sum()))

        return draw


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
