"""Scoring as the paper describes it: one whole forward pass for each switched layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from converter.inference.example import Example


def answer_nll(model: Any, example: Example, full_layers: Sequence[int]) -> float:
    """Mean answer NLL of a loaded hybrid with the given full-attention layers."""
    model.set_full_attention_layers(list(full_layers))
    ids = [*example.prompt, *example.answer[:-1]]
    with torch.inference_mode():
        logits = model(
            input_ids=torch.tensor([ids]),
            logits_to_keep=torch.arange(len(example.prompt) - 1, len(ids)),
            prompt_length=len(example.prompt),
            use_cache=False,
        ).logits[0]
        answer = torch.tensor(example.answer)
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
        return float(-exact.gather(1, answer[:, None]).mean())


def restore_one(model: Any, example: Example, layers: Sequence[int]) -> list[float]:
    """Restore-one scores of layers that may slide, by one pass more than there are layers."""
    sliding = answer_nll(model, example, ())
    return [sliding - answer_nll(model, example, (layer,)) for layer in layers]
