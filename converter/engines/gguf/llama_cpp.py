"""llama.cpp on one file, through the C interface that llama-cpp-python exposes.

Its high-level class is left alone for two reasons: it keeps a full-size cache unless told not to,
and it reuses the beginning of an earlier prompt, which gives wrong tokens with a small one. Here
the cache is small and empty before every text.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from converter.common.errors import GgufError
from converter.engines.gguf.extra import import_extra

BATCH_TOKENS = 512
CACHE_PADDING = 256
# ggml's numbers of the cache's types (ggml/include/ggml.h).
_F32, _F16 = 0, 1
_CACHE_LINE = re.compile(r"llama_kv_cache: size = .* \( *(\d+) cells, *(\d+) layers")
_PIECE_BYTES = 256
_ERROR_LEVEL = 3


@dataclass(frozen=True)
class LlamaCppSettings:
    """How to load a file.

    Attributes:
        context_tokens: how many tokens the full layers' cache holds.
        exact: a float32 cache, and attention step by step; else float16, and as llama.cpp chooses.
        overrides: metadata to change at load.
        extra_buffers: lay weights out anew for faster kernels of the processor.
        sampling: temperature, top_k, top_p, min_p and seed, where `next_token` is to draw tokens; a
            temperature of 0 takes the most likely one, and 0, 1 and 0 leave the others out.
    """

    context_tokens: int
    exact: bool = False
    overrides: Mapping[str, int] | None = None
    batch_tokens: int = BATCH_TOKENS
    extra_buffers: bool = True
    sampling: Mapping[str, float] | None = None

    @property
    def full_cells(self) -> int:
        """Tokens that a full layer's cache holds."""
        return _padded(self.context_tokens)

    def sliding_cells(self, window_tokens: int) -> int:
        """Tokens that a sliding layer's cache holds: the window and a batch, padded.

        The rule is llama.cpp's (src/llama-kv-cache-iswa.cpp).
        """
        most = self.full_cells
        return _padded(min(most, window_tokens + min(self.batch_tokens, most)))


def _padded(cells: int) -> int:
    return -(-cells // CACHE_PADDING) * CACHE_PADDING


def threads() -> int:
    """How many threads to compute with: what OMP_NUM_THREADS says, else every CPU."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) if told.isdigit() and int(told) else os.cpu_count() or 1


class LlamaCppModel:
    """A loaded file whose structure has been checked; use it as a context manager.

    Attributes:
        caches: cells (tokens) and layers of each cache that llama.cpp allocated.
        window_tokens: the window that it works with; 0 when it runs full attention.

    Raises:
        GgufError: llama.cpp refuses it.
    """

    def __init__(self, path: Path, settings: LlamaCppSettings) -> None:
        self._api: Any = import_extra("llama_cpp")
        self._lines: list[tuple[int, str]] = []
        self._callback = self._api.llama_log_callback(self._log)
        self._api.llama_log_set(self._callback, ctypes.c_void_p(0))
        self._api.llama_backend_init()
        self._model: Any = None
        self._context: Any = None
        self._batch: Any = None
        self._sampler: Any = None
        self._batch_tokens, self._position = settings.batch_tokens, 0
        try:
            self._load(path, settings)
        except BaseException:
            self.close()
            raise
        self._vocabulary = self._api.llama_model_get_vocab(self._model)
        self.window_tokens: int = self._api.llama_model_n_swa(self._model)
        found = _CACHE_LINE.findall("".join(line for _, line in self._lines))
        self.caches = [(int(cells), int(layers)) for cells, layers in found if int(layers)]
        self._lines.clear()

    def _log(self, level: int, text: bytes, _user_data: object) -> None:
        self._lines.append((level, text.decode("utf-8", "replace")))

    def _load(self, path: Path, settings: LlamaCppSettings) -> None:
        api = self._api
        model_parameters = api.llama_model_default_params()
        model_parameters.use_extra_bufts = settings.extra_buffers
        if settings.overrides:
            # The array ends with an entry whose key is empty.
            table = (api.llama_model_kv_override * (len(settings.overrides) + 1))()
            for entry, (key, value) in zip(table, settings.overrides.items(), strict=False):
                entry.key = key.encode()
                entry.tag = api.LLAMA_KV_OVERRIDE_TYPE_INT
                entry.value.val_i64 = value
            model_parameters.kv_overrides = table
        self._model = api.llama_model_load_from_file(os.fsencode(path), model_parameters)
        if not self._model:
            raise self._refusal(path, "llama.cpp does not load this file")
        parameters = api.llama_context_default_params()
        parameters.n_ctx = settings.context_tokens
        parameters.n_batch = parameters.n_ubatch = settings.batch_tokens
        parameters.n_threads = parameters.n_threads_batch = threads()
        parameters.swa_full = False
        parameters.type_k = parameters.type_v = _F32 if settings.exact else _F16
        if settings.exact:
            parameters.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = api.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise self._refusal(path, "llama.cpp cannot make a context for this file")
        self._batch = api.llama_batch_init(settings.batch_tokens, 0, 1)
        if settings.sampling is not None:
            self._sampler = self._chain(**settings.sampling)

    def _chain(
        self, *, temperature: float, top_k: float, top_p: float, min_p: float, seed: float
    ) -> Any:
        """The samplers of llama.cpp's own command line, in its order."""
        api = self._api
        chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        if temperature == 0:
            steps = [api.llama_sampler_init_greedy()]
        else:
            steps = [
                api.llama_sampler_init_top_k(int(top_k)),
                api.llama_sampler_init_top_p(top_p, 1),
                api.llama_sampler_init_min_p(min_p, 1),
                api.llama_sampler_init_temp(temperature),
                api.llama_sampler_init_dist(int(seed)),
            ]
        for step in steps:
            api.llama_sampler_chain_add(chain, step)
        return chain

    def _refusal(self, path: Path, problem: str) -> GgufError:
        advice = "check that llama-cpp-python is 0.3.36 or newer, and that memory is enough"
        return GgufError(problem, where=path, got=self._complaint(), next_step=advice)

    def _complaint(self) -> str | None:
        """The line that says what is wrong; the last ones only say that it failed."""
        found = [line.strip() for level, line in self._lines if level >= _ERROR_LEVEL]
        errors = [line for line in found if line.strip(".")]
        telling = [line for line in errors if "error loading" in line]
        return next(iter(telling or errors[-1:]), None)

    def __enter__(self) -> LlamaCppModel:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the memory back."""
        if self._sampler is not None:
            self._api.llama_sampler_free(self._sampler)
        if self._batch is not None:
            self._api.llama_batch_free(self._batch)
        if self._context:
            self._api.llama_free(self._context)
        if self._model:
            self._api.llama_model_free(self._model)
        self._model = self._context = self._batch = self._sampler = None
        # llama.cpp must not call what Python may have forgotten.
        self._api.llama_log_set(self._api.llama_log_callback(0), ctypes.c_void_p(0))

    def clear(self) -> None:
        """Forget every token, and draw from the seed anew."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        if self._sampler is not None:
            self._api.llama_sampler_reset(self._sampler)
        self._position = 0

    def feed(self, ids: Sequence[int], rows: Sequence[int]) -> NDArray[Any]:
        """Compute tokens after those before.

        Returns:
            (rows, vocabulary) float32: logits of some of the tokens, ascending.

        Raises:
            GgufError: llama.cpp fails, as when the context is full.
        """
        size = self._api.llama_vocab_n_tokens(self._vocabulary)
        found = numpy.empty((len(rows), size), numpy.float32)
        space = iter(found)
        for start in range(0, len(ids), self._batch_tokens):
            piece = ids[start : start + self._batch_tokens]
            chosen = [row - start for row in rows if 0 <= row - start < len(piece)]
            self._decode(piece, chosen)
            for index in chosen:
                pointer = self._api.llama_get_logits_ith(self._context, index)
                next(space)[:] = numpy.ctypeslib.as_array(pointer, shape=(size,))
        return found

    def next_token(self, ids: Sequence[int]) -> int:
        """Compute at most a batch of tokens after those before, and draw the one after them."""
        self._decode(ids, [len(ids) - 1])
        return int(self._api.llama_sampler_sample(self._sampler, self._context, -1))

    def _decode(self, ids: Sequence[int], with_logits: Sequence[int]) -> None:
        batch = self._batch
        for i, token in enumerate(ids):
            batch.token[i] = token
            batch.pos[i] = self._position + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = i in with_logits
        batch.n_tokens = len(ids)
        status = self._api.llama_decode(self._context, batch)
        if status != 0:
            raise GgufError(
                "llama.cpp fails to compute",
                got=f"status {status}: {self._complaint() or 'no reason given'}",
                next_step="use a shorter prompt or a larger --context" if status == 1 else None,
            )
        self._position += len(ids)

    def tokenize(self, text: str, *, around: bool) -> list[int]:
        """Token ids of a text, which may spell special tokens.

        With `around` the first and last token that the file asks for are added.
        """
        raw, vocabulary = text.encode(), self._vocabulary
        room = len(raw) + 16
        buffer = (self._api.llama_token * room)()
        count = self._api.llama_tokenize(vocabulary, raw, len(raw), buffer, room, around, True)
        if count < 0:
            raise GgufError("llama.cpp cannot tokenize a text", got=f"status {count}")
        return list(buffer[:count])

    def piece(self, token: int) -> bytes:
        """The bytes of a token; none for special ones."""
        room, convert = _PIECE_BYTES, self._api.llama_token_to_piece
        while True:
            buffer = (ctypes.c_char * room)()
            count: int = convert(self._vocabulary, token, buffer, room, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            room = -count

    def ends(self, token: int) -> bool:
        """Whether a token ends an answer."""
        return bool(self._api.llama_vocab_is_eog(self._vocabulary, token))
