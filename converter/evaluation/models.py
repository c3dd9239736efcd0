"""Loaded models: which one runs a variant, and how it generates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.checkpoint.reader import stale_code
from converter.common.errors import CheckpointError
from converter.common.progress import quiet_libraries
from converter.evaluation.tasks.item import Item
from converter.evaluation.variants import Variant
from converter.inference.load import Placement
from converter.model.source import Source
from converter.plan.plan import Plan

if TYPE_CHECKING:
    import torch


class VariantModels:
    """The models of an evaluation.

    Args:
        model: a loaded checkpoint that can switch plans, or a plain model.
        source: the source under transformers' own class, when variants ask for it.
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, model: Any, source: Any, tokenizer: Any) -> None:
        self._model, self._source, self._tokenizer = model, source, tokenizer

    def running(self, variant: Variant) -> Any:
        """The model that computes a variant; valid until the next call."""
        if variant.separate:
            return self._source
        if switches_plans(self._model):
            self._model.set_full_attention_layers(list(variant.full_attention_layers))
        return self._model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of both."""
        return self._tokenizer

    def generate(self, variant: Variant, items: Sequence[Item]) -> list[str]:
        """What a variant answers, greedily, all items as one left-padded batch.

        The cache is the model's own, which holds for each layer what its mask will read again.
        Each answer is cut to its item's room, so that it does not depend on the others.
        """
        import torch
        from transformers import GenerationConfig

        model = self.running(variant)
        longest = max(len(item.prompt) for item in items)
        ids = torch.zeros(len(items), longest, dtype=torch.long)
        real = torch.zeros_like(ids)
        for row, item in enumerate(items):
            ids[row, longest - len(item.prompt) :] = torch.tensor(item.prompt)
            real[row, longest - len(item.prompt) :] = 1
        stop = getattr(model.generation_config, "eos_token_id", None)
        with torch.inference_mode():
            output = model.generate(
                ids.to(model.device),
                attention_mask=real.to(model.device),
                generation_config=GenerationConfig(
                    max_new_tokens=max(item.new_tokens for item in items),
                    do_sample=False,
                    # Any token will do: what follows an end is cut off below.
                    pad_token_id=0,
                    eos_token_id=stop,
                ),
            )
        ends = set(stop) if isinstance(stop, list) else {stop}
        return [
            self._tokenizer.decode(
                _before_end(new[: item.new_tokens], ends), skip_special_tokens=True
            )
            for new, item in zip(output[:, longest:].tolist(), items, strict=True)
        ]

    def logits(
        self, variant: Variant, ids: Sequence[int], first: int, prompt_tokens: int | None = None
    ) -> torch.Tensor:
        """Float32 logits of one sequence.

        Args:
            variant: which plan.
            ids: the tokens.
            first: the first row that is returned; rows predict the token after them.
            prompt_tokens: where generated tokens begin, under full attention in decode.

        Returns:
            (len(ids) - first, vocabulary).
        """
        import torch

        model = self.running(variant)
        # Only our own class must be told; a full model computes the same without.
        options = {"prompt_length": prompt_tokens} if switches_plans(model) else {}
        rows = torch.arange(first, len(ids), device=model.device)
        with torch.inference_mode():
            logits: torch.Tensor = model(
                input_ids=torch.tensor([list(ids)], device=model.device),
                logits_to_keep=rows,
                use_cache=False,
                **options,
            ).logits[0]
        return logits.float()


def switches_plans(model: Any) -> bool:
    """Whether a loaded model is of our class."""
    return hasattr(model, "set_full_attention_layers")


def _before_end(tokens: list[int], ends: set[int | None]) -> list[int]:
    return next((tokens[:i] for i, token in enumerate(tokens) if token in ends), tokens)


def load_checkpoint(
    folder: Path, source: Source, plan: Plan, placement: Placement, *, trust: bool
) -> Any:
    """A checkpoint of ours through the code it ships, which can switch plans.

    Raises:
        CheckpointError: its Python files are not this version's and are not trusted.
    """
    if not trust and stale_code(folder, source, plan):
        raise CheckpointError(
            "the checkpoint's Python files are not this version's, and they are needed",
            where=folder,
            next_step="read them, then pass --trust-remote-code to run them",
        )
    return _load(folder, placement, trust=True)


def load_source(source: Source, placement: Placement) -> Any:
    """A model that was not converted, under transformers' own class."""
    return _load(source.folder, placement, trust=False)


def _load(folder: Path, placement: Placement, *, trust: bool) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    quiet_libraries()
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, placement.dtype),
        trust_remote_code=trust,
        local_files_only=True,
    )
    # Not `device_map`, which needs the accelerate package.
    return model.to(placement.device).eval()
