"""Running a checkpoint in transformers: streamed text, and what it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.checkpoint.reader import open_checkpoint
from converter.common.errors import CheckpointError, UsageError, refusing
from converter.inference.completion import (
    Completion,
    GenerationSettings,
    StoppingText,
    Turn,
    before_stop,
)
from converter.inference.load import Placement, load_checkpoint
from converter.inference.tokenizer import chat_text, load_tokenizer
from converter.plan.plan import kv_bytes


@dataclass(frozen=True)
class RunSettings:
    """How to run a checkpoint.

    Attributes:
        generation: how to continue a text.
        full_attention_layers, profile: another plan, by the ranking or by name, or None.
        original: the original is asked, too; it has the same weights.
        trust_remote_code: run the checkpoint's own Python files instead of this version's.
    """

    generation: GenerationSettings
    full_attention_layers: int | None = None
    profile: str | None = None
    original: bool = False
    trust_remote_code: bool = False


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
            switches_plans=settings.original,
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

    def complete(
        self, prompt: str, *, is_chat: bool, show: Callable[[str], None], original: bool = False
    ) -> Completion:
        """Continue a text, or for a chat what `prompt_of` made; `show` takes pieces as they come.

        An interrupt ends an answer in a chat, which counts as far as it came.

        Args:
            original: every layer has full attention, as in the model that was converted.

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
        settings = self._settings.generation
        torch.manual_seed(settings.seed)
        tokens = torch.tensor([ids], device=self._model.device)
        room, interrupted = min(settings.max_new_tokens, context - len(ids)), False
        with self._running(original):
            cache = DynamicCache(config=self._model.config)
            streamer = _stopwatch(self._tokenizer, StoppingText(settings.stop, show))
            started = time.perf_counter()
            try:
                self._generate(tokens, cache, streamer, room)
            except KeyboardInterrupt:
                if not is_chat:
                    raise
                interrupted = True
                streamer.end()
        times = streamer.times or [time.perf_counter()]
        text = self._tokenizer.decode(streamer.ids, skip_special_tokens=True)
        held = len(ids) + len(streamer.ids) - 1
        return Completion(
            text=before_stop(text, settings.stop),
            prompt_tokens=len(ids),
            new_tokens=len(streamer.ids),
            prefill_seconds=times[0] - started,
            decode_seconds=times[-1] - times[0],
            cache_bytes=cache_bytes(cache),
            full_cache_bytes=kv_bytes(self._plan, self._source.shape, held)["full"]
            * self._model.dtype.itemsize
            // self._source.shape.kv_bytes_per_value,
            interrupted=interrupted,
        )

    def _generate(self, tokens: Any, cache: Any, streamer: Any, most: int) -> None:
        import torch

        settings = self._settings.generation
        unusable = "the checkpoint's generation settings cannot be used"
        where = self._source.folder / "generation_config.json"
        stop = {"stop_strings": [*settings.stop], "tokenizer": self._tokenizer}
        with refusing(unusable, where, CheckpointError), torch.inference_mode():
            self._model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                past_key_values=cache,
                max_new_tokens=most,
                streamer=streamer,
                pad_token_id=self._tokenizer.pad_token_id or 0,
                **_sampling(settings),
                **(stop if settings.stop else {}),
            )

    @contextmanager
    def _running(self, original: bool) -> Iterator[None]:
        """The model with the plan asked for, or as the original."""
        if not original:
            yield
            return
        config = self._model.config
        plan = config.hybrid if "layer_types" in config.hybrid else vars(config)
        kinds = plan["layer_types"]
        self._model.set_full_attention_layers([*self._source.shape.full_layers])
        try:
            yield
        finally:
            plan["layer_types"] = kinds


def cache_bytes(cache: Any) -> int:
    """Bytes of keys and values that a transformers cache holds, sinks included."""
    return sum(
        tensor.nbytes
        for layer in cache.layers
        # Of a layer whose KV heads attend differently, each kind's.
        for part in getattr(layer, "parts", (layer,))
        for name in ("keys", "values", "sink_keys", "sink_values")
        if (tensor := getattr(part, name, None)) is not None
    )


def _sampling(settings: GenerationSettings) -> dict[str, Any]:
    """Options of `generate`; what is not said is left to the checkpoint."""
    names = ("temperature", "top_k", "top_p", "min_p")
    if settings.temperature == 0:
        return {"do_sample": False, **dict.fromkeys(names)}
    said = {name: getattr(settings, name) for name in names}
    given = {name: value for name, value in said.items() if value is not None}
    return {"do_sample": True, **given} if given else {}


def _stopwatch(tokenizer: Any, text: StoppingText) -> Any:
    """A transformers streamer that hands text on and notes each token and when it came."""
    from transformers import TextStreamer

    class Stopwatch(TextStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.ids: list[int] = []
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            if not self.next_tokens_are_prompt:
                self.ids += value.tolist()
                self.times.append(time.perf_counter())
            super().put(value)

        def on_finalized_text(self, piece: str, stream_end: bool = False) -> None:
            text.add(piece)
            if stream_end:
                text.end()

    return Stopwatch()
