"""Whole checkpoints in transformers: every way to generate gives what the definition gives."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from converter.checkpoint.reader import open_checkpoint
from converter.plan.plan import kv_bytes
from tests.brute_force import FULL, SLIDING
from tests.conftest import CONTEXT, FAMILIES, LAYERS, Folders, Greedy, Models
from tests.hybrids import (
    EQUAL,
    EVERY,
    NEW,
    PLAN,
    PROMPT,
    REPEATING,
    WINDOW,
    generate,
    generate_batch,
    load,
    random_ids,
    rule,
)


@pytest.mark.parametrize(("family", "mask"), EVERY)
def test_the_logits_are_the_definitions(
    family: str, mask: str, model: Models, eager: Models
) -> None:
    ids, prompt = random_ids(300, seed=5), 280
    with torch.inference_mode():
        found = model(family, mask)(input_ids=torch.tensor([ids]), prompt_length=prompt).logits[0]
    expected = eager(family).logits(ids, PLAN, **rule(mask, prompt))
    full = eager(family).logits(ids, [FULL] * LAYERS, window=WINDOW)
    # Norms and rotary embeddings are float32 inside; the spread of these logits is about 1.
    assert (found - expected).abs().max() < 1e-5
    assert (found - full)[:WINDOW].abs().max() < 1e-5
    assert (found - full)[WINDOW:].abs().max() > 0.5


@pytest.mark.parametrize(("family", "mask"), EVERY)
@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, *({"prefill_chunk_size": size} for size in (17, WINDOW, 149))],
    ids=str,
)
def test_greedy_decoding_is_the_definitions(
    options: dict[str, Any], family: str, mask: str, model: Models, greedy: Greedy
) -> None:
    """Cached or not, and with the prompt in chunks."""
    assert generate(model(family, mask), PROMPT, **options) == greedy(family, mask)


@pytest.mark.parametrize(("family", "mask"), EVERY)
def test_prompt_lookup_decoding_is_greedy_decoding(
    family: str, mask: str, model: Models, greedy: Greedy
) -> None:
    found = generate(model(family, mask), REPEATING, prompt_lookup_num_tokens=4)
    assert found == greedy(family, mask, repeating=True)


@pytest.mark.parametrize(("family", "mask"), EVERY)
def test_beam_search_with_a_cache_is_beam_search_without(
    family: str, mask: str, model: Models
) -> None:
    options = {"num_beams": 3, "max_new_tokens": 10, "min_new_tokens": 10}
    cached = generate(model(family, mask), PROMPT, **options)
    assert cached == generate(model(family, mask), PROMPT, use_cache=False, **options)


@pytest.mark.parametrize(("family", "mask"), EVERY)
def test_a_left_padded_batch_generates_what_each_prompt_generates_alone(
    family: str, mask: str, model: Models, greedy: Greedy
) -> None:
    short = random_ids(61, seed=9)
    padding = len(PROMPT) - len(short)
    batch = torch.tensor([PROMPT, [0] * padding + short])
    expected = [greedy(family, mask), generate(model(family, mask), short)]
    assert generate_batch(model(family, mask), batch, padding) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_custom_llama_like_configs_do_not_slide_silently_in_decode(
    family: str, model: Models, eager: Models
) -> None:
    """Transformers builds sliding cache layers from `layer_types` under full masks."""
    hybrid, ids = model(family, "sinks"), random_ids(120, seed=8)
    expected = eager(family).logits(ids, PLAN, **rule("sinks", len(ids)))
    for given in (None, DynamicCache(), DynamicCache(config=hybrid.config)):
        with torch.inference_mode():
            cache, logits = given, []
            for piece in (ids[:60], *([token] for token in ids[60:])):
                output = hybrid(torch.tensor([piece]), past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                logits.append(output.logits[0])
        assert (torch.cat(logits) - expected).abs().max() < 1e-5


def test_a_caller_may_keep_the_cache_between_turns(model: Models, eager: Models) -> None:
    hybrid, cache = model("qwen3", "sinks"), DynamicCache()
    first = generate(hybrid, PROMPT, past_key_values=cache)
    second = [*PROMPT, *first, *random_ids(40, seed=12)]
    found = generate(hybrid, second, past_key_values=cache)
    assert found == eager("qwen3").greedy(second, NEW, PLAN, **rule("sinks", len(second)))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_of_a_window_holds_the_bytes_that_the_plan_promises(
    family: str, checkpoint: Folders
) -> None:
    hybrid = load(checkpoint(family, "plain"), dtype="auto")
    source, plan = open_checkpoint(checkpoint(family, "plain"))
    prompt = CONTEXT - 12
    with torch.inference_mode():
        cache = hybrid(torch.tensor([random_ids(prompt)]), use_cache=True).past_key_values
        # Between two tokens there is no current one: a sliding layer keeps the window less it.
        assert [layer.keys.shape[2] for layer in cache.layers] == [
            prompt if kind == FULL else WINDOW - 1 for kind in PLAN
        ]
        hybrid(torch.tensor([[7]]), past_key_values=cache, use_cache=True)
    both = [states for layer in cache.layers for states in (layer.keys, layer.values)]
    promised = kv_bytes(plan, source.shape, prompt + 1)["hybrid"]
    current_token = PLAN.count(SLIDING) * source.shape.kv_bytes_per_token
    assert sum(states.nbytes for states in both) == promised - current_token
    # What is kept is a view of the window with the current token: that is what memory holds.
    assert sum(states.untyped_storage().nbytes() for states in both) == promised


def test_loss_and_gradients_are_those_of_the_logits(checkpoint: Folders) -> None:
    hybrid = load(checkpoint("llama", "sinks"))
    ids = torch.tensor([random_ids(140, seed=2)])
    output = hybrid(ids, labels=ids)
    by_hand = torch.nn.functional.cross_entropy(output.logits[0, :-1], ids[0, 1:])
    assert abs(float(output.loss.detach()) - float(by_hand.detach())) < 1e-6
    weight = hybrid.model.layers[0].self_attn.k_proj.weight
    (slope,) = torch.autograd.grad(output.loss, weight)
    direction, step = slope / slope.norm(), 1e-3
    with torch.no_grad():
        weight += step * direction
        above = float(hybrid(ids, labels=ids).loss)
        weight -= 2 * step * direction
        below = float(hybrid(ids, labels=ids).loss)
    assert (above - below) / (2 * step) == pytest.approx(float(slope.norm()), rel=1e-3)


@pytest.mark.parametrize("mask", ["plain", "sinks and full decode"])
def test_a_prefill_is_compiled_whole(mask: str, checkpoint: Folders) -> None:
    """Dynamo alone, which asks for no compiler: it would refuse code that it cannot trace."""
    hybrid, ids = load(checkpoint("qwen3", mask)), torch.tensor([random_ids(400)])
    with torch.inference_mode():
        expected = hybrid(ids).logits
        found = torch.compile(hybrid, backend="eager", fullgraph=True)(ids).logits
    assert (found - expected).abs().max() < EQUAL


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mask", ["plain", "sinks"])
def test_packed_sequences_give_the_logits_of_each_alone(
    family: str, mask: str, model: Models
) -> None:
    lengths = (70, 1, 90)
    pieces = [random_ids(length, seed=length) for length in lengths]
    positions = torch.tensor([[i for length in lengths for i in range(length)]])
    with torch.inference_mode():
        ids = torch.tensor([list(chain(*pieces))])
        packed = model(family, mask)(ids, position_ids=positions, use_cache=False).logits[0]
        alone = [model(family, mask)(torch.tensor([piece])).logits[0] for piece in pieces]
    assert (packed - torch.cat(alone)).abs().max() < 1e-5
