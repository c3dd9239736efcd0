"""Costs by formula against counting, and against what a running model holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from converter.evaluation.cost import contexts, costs, pairs_seen, prefill_flop
from converter.evaluation.models import Variant
from converter.inference.generate import cache_bytes
from converter.model.mask import Mask
from converter.model.source import open_source
from tests.conftest import LAYERS
from tests.evaluation.conftest import MASK_OF
from tests.hybrids import KEPT, random_ids


@pytest.mark.parametrize("tokens", [1, 5, 8, 9, 30])
@pytest.mark.parametrize("mask", [None, Mask(8), Mask(8, 3), Mask(1, 0)])
def test_pairs_are_those_of_the_mask(tokens: int, mask: Mask | None) -> None:
    q, p = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    seen = p <= q
    if mask is not None:
        seen &= (p > q - mask.window_tokens) | (p < mask.sink_tokens)
    assert pairs_seen(tokens, mask) == int(seen.sum())


def test_operations_are_those_that_torch_counts(sources: dict[str, Path]) -> None:
    """Torch's own counter on the unmodified model, whose attention is full."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    source = open_source(str(sources["qwen3"]))
    model = AutoModelForCausalLM.from_pretrained(
        sources["qwen3"], attn_implementation="eager", dtype=torch.float32
    )
    tokens = 64
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.tensor([random_ids(tokens)]), logits_to_keep=1)
    # Eager attention computes the upper triangle too, and rotary positions are one small product.
    shape = source.shape
    upper = tokens * (tokens - 1) // 2 * shape.layers * 4 * shape.heads * shape.head_dim
    rotary = tokens * shape.head_dim
    found = prefill_flop(source, LAYERS, None, tokens)
    assert found + upper == pytest.approx(counter.get_total_flops(), abs=rotary)


@pytest.mark.parametrize("name", ["plain", "sinks", "full decode"])
def test_kv_bytes_are_what_a_running_model_holds(
    name: str, sources: dict[str, Path], model: Callable[[str, str], Any]
) -> None:
    source = open_source(str(sources["qwen3"]))
    found = costs(source, (Variant("hybrid", KEPT, "layers"),), MASK_OF[name])["hybrid"]
    ids = torch.tensor([random_ids(found[-1]["context_tokens"])])
    with torch.inference_mode():
        cache = model("qwen3", name)(input_ids=ids, use_cache=True, logits_to_keep=1)
    held = cache_bytes(cache.past_key_values) * source.shape.kv_bytes_per_value // 8
    # transformers keeps one token less than the window: the current one is added when it comes.
    sliding = 0 if name == "full decode" else LAYERS - len(KEPT)
    assert held == found[-1]["kv_bytes"] - sliding * source.shape.kv_bytes_per_token


def test_contexts_end_with_the_models() -> None:
    assert contexts(4096) == (64, 128, 256, 512, 1024, 2048, 4096)
    assert contexts(3) == (1, 3)
