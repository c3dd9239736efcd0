"""Running a checkpoint in transformers: streamed text, and what it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.checkpoint.format import format_of
from converter.checkpoint.verify.checks import open_checkpoint
from converter.checkpoint.verify.static import stale_code
from converter.common.errors import CheckpointError, UsageError
from converter.common.progress import quiet_libraries
from converter.inference.load import Placement
from converter.inference.tokenizer import load_tokenizer
from converter.model.source import Source
from converter.plan.plan import Plan, kv_bytes

Turn = dict[str, str]


@dataclass(frozen=True)
class RunSettings:
    """How to generate.

    Attributes:
        max_new_tokens: where to stop at the latest.
        temperature: 0 takes the most likely token; above 0 samples.
        seed: of the sampling.
        full_attention_layers: a count by the ranking; None leaves the checkpoint's plan.
        profile: a named plan; None leaves the checkpoint's plan.
        trust_remote_code: run Python files that are not this version's.
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
        text: the new text.
        prompt_tokens, new_tokens: counts.
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
        if self.new_tokens < 2:
            return None
        return (self.new_tokens - 1) / max(self.decode_seconds, 1e-9)


class Runner:
    """A loaded checkpoint.

    Args:
        folder: a checkpoint of ours.
        placement: device and dtype.
        settings: how to generate.

    Raises:
        CheckpointError: it is not one, or its code may not be run and no native class computes it.
        UsageError: the plan asked for does not exist.
    """

    def __init__(self, folder: Path, placement: Placement, settings: RunSettings) -> None:
        quiet_libraries()
        self._settings = settings
        self._source, self._plan = open_checkpoint(folder)
        self._model = load_checkpoint(folder, self._source, self._plan, placement, settings)
        self._tokenizer: Any = load_tokenizer(folder, self._model.config)
        self._placement = placement

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
        text: str = self._tokenizer.apply_chat_template(
            list(turns), tokenize=False, add_generation_prompt=True
        )
        return text

    def complete(self, prompt: str, *, is_chat: bool, show: Callable[[str], None]) -> Completion:
        """Continue a text, handing over pieces as they come.

        Args:
            prompt: the text; for a chat, what `prompt_of` made.
            is_chat: the template has written the special tokens already.
            show: takes each piece of new text.

        Raises:
            UsageError: the prompt is empty, or does not fit the model's context.
        """
        import torch
        from transformers import DynamicCache

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
        sampling = (
            {"do_sample": True, "temperature": settings.temperature}
            if settings.temperature > 0
            else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        )
        started = time.perf_counter()
        with torch.inference_mode():
            output = self._model.generate(
                torch.tensor([ids], device=self._placement.device),
                attention_mask=torch.ones(
                    1, len(ids), dtype=torch.long, device=self._placement.device
                ),
                past_key_values=cache,
                max_new_tokens=min(settings.max_new_tokens, context - len(ids)),
                streamer=streamer,
                pad_token_id=self._tokenizer.pad_token_id or 0,
                **sampling,
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
    names = ("keys", "values", "sink_keys", "sink_values")
    return sum(
        tensor.numel() * tensor.itemsize
        for layer in cache.layers
        for name in names
        if (tensor := getattr(layer, name, None)) is not None
    )


def load_checkpoint(
    folder: Path,
    source: Source,
    plan: Plan,
    placement: Placement,
    settings: RunSettings,
    *,
    switching: bool = False,
) -> Any:
    """A checkpoint in transformers, through its own code where that may be run.

    Args:
        folder, source, plan: the checkpoint, the model inside it, and its plan.
        placement: device and dtype.
        settings: which of its plans to run, and whether its code is trusted.
        switching: the plan will be switched, which only its own code can do.

    Raises:
        CheckpointError: its code is needed and may not be run.
        UsageError: the plan asked for does not exist.
    """
    import torch
    from transformers import AutoModelForCausalLM

    trust = settings.trust_remote_code or not stale_code(folder, source, plan)
    choice: dict[str, Any] = {}
    if settings.full_attention_layers is not None:
        choice["full_attention_layers"] = settings.full_attention_layers
    if settings.profile is not None:
        choice["profile"] = settings.profile
    if not trust and (switching or choice or not format_of(source, plan.mask).native):
        raise CheckpointError(
            "the checkpoint's Python files are not this version's, and they are needed",
            where=folder,
            next_step="read them, then pass --trust-remote-code to run them",
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, placement.dtype),
            trust_remote_code=trust,
            local_files_only=True,
            **choice,
        )
    except ValueError as error:
        if not choice:
            raise
        raise UsageError("the plan asked for cannot be used", got=error) from error
    return model.to(placement.device).eval()


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

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            del stream_end
            show(text)

    return Stopwatch()
