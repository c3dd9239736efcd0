"""Running a checkpoint in transformers: streamed text, and what it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.checkpoint.reader import open_checkpoint
from converter.common.errors import CheckpointError, UsageError, refusing
from converter.inference.load import Placement, load_checkpoint
from converter.inference.tokenizer import chat_text, load_tokenizer
from converter.plan.plan import kv_bytes

Turn = dict[str, str]


@dataclass(frozen=True)
class RunSettings:
    """How to generate.

    Attributes:
        temperature: 0 takes the most likely token; above 0 samples.
        full_attention_layers, profile: another plan, by the ranking or by name, or None.
        trust_remote_code: run the checkpoint's own Python files instead of this version's.
    """

    max_new_tokens: int
    temperature: float
    seed: int
    full_attention_layers: int | None
    profile: str | None
    trust_remote_code: bool


@dataclass(frozen=True)
class Completion:
    """What one request gave and took.

    Attributes:
        prefill_seconds: until the first new token.
        decode_seconds: from the first new token to the last.
        cache_bytes: keys and values held at the end.
        full_cache_bytes: what full attention in every layer would hold.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    cache_bytes: int
    full_cache_bytes: int

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Speed after the first token; None when there was no second one."""
        later = self.new_tokens - 1
        return later / max(self.decode_seconds, 1e-9) if later > 0 else None


class Runner:
    """A loaded checkpoint of ours.

    Raises:
        CheckpointError: it is not one, or its code is needed and is not this version's.
        UsageError: the plan asked for does not exist.
    """

    def __init__(self, folder: Path, placement: Placement, settings: RunSettings) -> None:
        self._settings = settings
        self._source, self._plan = open_checkpoint(folder)
        self._model = load_checkpoint(
            folder,
            self._source,
            self._plan,
            placement,
            trust=settings.trust_remote_code,
            full_attention_layers=settings.full_attention_layers,
            profile=settings.profile,
        )
        self._tokenizer: Any = load_tokenizer(folder, self._source.config)

    def prompt_of(self, turns: Sequence[Turn]) -> str:
        """A conversation as the model was trained to read it.

        Raises:
            UsageError: the tokenizer has no chat template.
        """
        if not self._tokenizer.chat_template:
            raise UsageError(
                "this model has no chat template",
                where="--chat",
                next_step="leave --chat out and give the text to continue",
            )
        return chat_text(self._tokenizer, list(turns))

    def complete(self, prompt: str, *, is_chat: bool, show: Callable[[str], None]) -> Completion:
        """Continue a text, or for a chat what `prompt_of` made; `show` takes pieces as they come.

        Raises:
            UsageError: the prompt is empty, or does not fit the model's context.
            CheckpointError: its generation settings cannot be used.
        """
        import torch
        from transformers import DynamicCache

        # A template has written the special tokens already.
        ids = self._tokenizer.encode(prompt, add_special_tokens=not is_chat)
        context = self._source.shape.context_tokens
        if not 0 < len(ids) < context:
            raise UsageError(
                "the prompt cannot be used",
                where="prompt",
                expected=f"1 to {context - 1} tokens",
                got=f"{len(ids)} tokens",
            )
        settings = self._settings
        torch.manual_seed(settings.seed)
        cache = DynamicCache(config=self._model.config)
        streamer = _stopwatch(self._tokenizer, show)
        tokens = torch.tensor([ids], device=self._model.device)
        started = time.perf_counter()
        unusable = "the checkpoint's generation settings cannot be used"
        where = self._source.folder / "generation_config.json"
        with refusing(unusable, where, CheckpointError), torch.inference_mode():
            output = self._model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                past_key_values=cache,
                max_new_tokens=min(settings.max_new_tokens, context - len(ids)),
                streamer=streamer,
                pad_token_id=self._tokenizer.pad_token_id or 0,
                **_sampling(settings.temperature),
            )
        new = output[0, len(ids) :].tolist()
        first, last = streamer.times[0], streamer.times[-1]
        held = len(ids) + len(new) - 1
        return Completion(
            text=self._tokenizer.decode(new, skip_special_tokens=True),
            prompt_tokens=len(ids),
            new_tokens=len(new),
            prefill_seconds=first - started,
            decode_seconds=last - first,
            cache_bytes=cache_bytes(cache),
            full_cache_bytes=kv_bytes(self._plan, self._source.shape, held)["full"]
            * self._model.dtype.itemsize
            // self._source.shape.kv_bytes_per_value,
        )


def cache_bytes(cache: Any) -> int:
    """Bytes of keys and values that a transformers cache holds, sinks included."""
    return sum(
        tensor.nbytes
        for layer in cache.layers
        for name in ("keys", "values", "sink_keys", "sink_values")
        if (tensor := getattr(layer, name, None)) is not None
    )


def _sampling(temperature: float) -> dict[str, Any]:
    """Options of `generate`: 0 takes the most likely token."""
    if temperature > 0:
        return {"do_sample": True, "temperature": temperature}
    return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def _stopwatch(tokenizer: Any, show: Callable[[str], None]) -> Any:
    """A transformers streamer that hands text to `show` and notes when each token came."""
    from transformers import TextStreamer

    class Stopwatch(TextStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            if not self.next_tokens_are_prompt:
                self.times.append(time.perf_counter())
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002
            show(text)

    return Stopwatch()
