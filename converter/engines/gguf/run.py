"""Running a GGUF of ours in llama.cpp: streamed text, and what it took."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.common.errors import GgufError, UsageError
from converter.engines.gguf.extra import import_extra
from converter.engines.gguf.hybrid_file import HybridFile, open_hybrid
from converter.engines.gguf.llama_cpp import CACHE_PADDING, LlamaCppModel, LlamaCppSettings
from converter.inference.generate import Completion, Turn

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Share of the memory that is left beside the weights which the cache may take; the rest is for
# llama.cpp's own buffers and for everything else on the machine.
_CACHE_SHARE = 0.5


@dataclass(frozen=True)
class GgufRunSettings:
    """How to generate.

    Attributes:
        max_new_tokens: where to stop at the latest.
        temperature: 0 takes the most likely token; above 0 samples.
        seed: of the sampling.
        context_tokens: room for prompt and answer; None takes the model's, or what memory allows.
    """

    max_new_tokens: int
    temperature: float
    seed: int
    context_tokens: int | None


class GgufRunner:
    """A loaded file.

    Args:
        path: a file of ours.
        settings: how to generate.

    Raises:
        GgufError: it is damaged, is not ours, or llama.cpp does not load it.
        UsageError: the context asked for cannot be had.
    """

    def __init__(self, path: Path, settings: GgufRunSettings) -> None:
        import_extra("llama_cpp")
        self._settings = settings
        self._file = open_hybrid(path)
        self._engine_settings = LlamaCppSettings(_context(self._file, settings.context_tokens))
        self._engine = LlamaCppModel(path, self._engine_settings)

    @property
    def context_tokens(self) -> int:
        """Room for prompt and answer."""
        return self._engine_settings.context_tokens

    @property
    def warning(self) -> str | None:
        """What the user must know before believing the text, or None."""
        if self._file.honoured:
            return None
        return (
            f"llama.cpp ignores the plan under {self._file.container.arch}: "
            "this is the original, with full attention"
        )

    def prompt_of(self, turns: Sequence[Turn]) -> str:
        """A conversation by the template in the file.

        Raises:
            UsageError: it has none, or one that fails.
        """
        from jinja2 import TemplateError

        metadata = self._file.container.metadata
        template = metadata.get("tokenizer.chat_template")
        if template is None:
            raise UsageError(
                "this file has no chat template",
                where="--chat",
                next_step="leave --chat out and give the text to continue",
            )
        api: Any = import_extra("llama_cpp")
        try:
            formatter = api.llama_chat_format.Jinja2ChatFormatter(
                template.value, eos_token=self._special("eos"), bos_token=self._special("bos")
            )
            prompt: str = formatter(messages=list(turns)).prompt
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise UsageError("the chat template cannot be used", got=error) from error
        return prompt

    def _special(self, name: str) -> str:
        metadata = self._file.container.metadata
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        tokens = metadata.get("tokenizer.ggml.tokens")
        if index is None or tokens is None or not 0 <= index.value < len(tokens.value):
            return ""
        return str(tokens.value[index.value])

    def complete(self, prompt: str, *, is_chat: bool, show: Callable[[str], None]) -> Completion:
        """Continue a text from an empty cache, handing over pieces as they come.

        Args:
            prompt: the text; for a chat, what `prompt_of` made.
            is_chat: the template has written the special tokens already.
            show: takes each piece of new text.

        Raises:
            UsageError: the prompt is empty, or does not fit.
        """
        ids = self._engine.tokenize(prompt, specials=True, around=not is_chat)
        if not 0 < len(ids) < self.context_tokens:
            raise UsageError(
                "the prompt cannot be used",
                where="prompt",
                expected=f"1 to {self.context_tokens - 1} tokens",
                got=f"{len(ids)} tokens",
                next_step="give a larger --context" if ids else None,
            )
        choose = _chooser(self._settings)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text, new = "", 0
        self._engine.clear()
        started = time.perf_counter()
        logits = self._engine.feed(ids, [len(ids) - 1])
        token = choose(logits[0])
        first = last = time.perf_counter()
        room = min(self._settings.max_new_tokens, self.context_tokens - len(ids))
        while True:
            new, last = new + 1, time.perf_counter()
            # The token that ends an answer has no text, but is one.
            ended = self._engine.ends(token)
            piece = decoder.decode(b"" if ended else self._engine.piece(token))
            text += piece
            show(piece)
            if ended or new >= room:
                break
            token = choose(self._engine.feed([token], [0])[0])
        rest = decoder.decode(b"", final=True)
        show(rest)
        return Completion(
            text=text + rest,
            prompt_tokens=len(ids),
            new_tokens=new,
            prefill_seconds=first - started,
            decode_seconds=last - first,
            cache_bytes=self._allocated(),
            full_cache_bytes=self._file.full_cache_bytes(self._engine_settings),
        )

    def _allocated(self) -> int:
        """Bytes of the caches that llama.cpp made, by the cells and layers it reports."""
        each = self._file.kv_values_per_token * 2
        return sum(cache.cells * cache.layers * each for cache in self._engine.caches)


def _chooser(settings: GgufRunSettings) -> Callable[[NDArray[Any]], int]:
    """The most likely token, or one drawn with its probability at the temperature."""
    import numpy

    if settings.temperature == 0:
        return lambda logits: int(logits.argmax())
    generator = numpy.random.default_rng(settings.seed)

    def draw(logits: NDArray[Any]) -> int:
        scaled = logits.astype(numpy.float64) / settings.temperature
        weights = numpy.exp(scaled - scaled.max())
        return int(generator.choice(len(weights), p=weights / weights.sum()))

    return draw


def _context(file: HybridFile, asked: int | None) -> int:
    """How many tokens of context to make room for.

    Raises:
        UsageError: more are asked for than the model was made for.
        GgufError: there is no memory for even a short one.
    """
    if asked is not None:
        if asked > file.context_tokens:
            raise UsageError(
                "the model was not made for so long a context",
                where="--context",
                expected=f"at most {file.context_tokens} tokens",
                got=asked,
            )
        return asked
    import psutil

    available = psutil.virtual_memory().available
    return fitting_context(file, int((available - file.weight_bytes) * _CACHE_SHARE))


def fitting_context(file: HybridFile, cache_bytes: int) -> int:
    """The longest context, up to the model's own, whose cache takes at most `cache_bytes`.

    Raises:
        GgufError: not even the shortest one fits.
    """
    if file.cache_bytes(LlamaCppSettings(file.context_tokens)) <= cache_bytes:
        return file.context_tokens
    low, high = 0, file.context_tokens // CACHE_PADDING
    while low < high:
        middle = (low + high + 1) // 2
        if file.cache_bytes(LlamaCppSettings(middle * CACHE_PADDING)) <= cache_bytes:
            low = middle
        else:
            high = middle - 1
    if low == 0:
        raise GgufError(
            "there is too little memory to run this file",
            where=file.path,
            expected=f"{file.weight_bytes:,} bytes of weights and a cache beside them",
            next_step="close other programs, give a --context, or export a smaller --type",
        )
    return low * CACHE_PADDING
