"""Checkpoints in which KV heads of one layer attend differently, as transformers runs them."""

from __future__ import annotations

from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from converter.inference.generate import cache_bytes
from converter.model.source import open_source
from tests.brute_force import FULL, SLIDING, EagerModel
from tests.conftest import (
    EVERY_FAMILY,
    FAMILIES,
    LAYERS,
    MORE_FAMILIES,
    Folders,
    Models,
    make_model,
)
from tests.hybrids import (
    MASKS,
    NEW,
    PROMPT,
    REPEATING,
    SINKS,
    WINDOW,
    generate,
    generate_batch,
    load,
    random_ids,
    rule,
)
from tests.kv_heads import (
    FULL_HEADS,
    KINDS,
    KV_HEADS,
    checkpoint_by_heads,
    grouped_model,
    kinds_in,
    mask_of,
)
from tests.runners import EXAMPLES, loss, nlls, resident

pytestmark = pytest.mark.usefixtures("exactly")

CLOSE = 1e-10


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return grouped_model(tmp_path_factory.mktemp("grouped") / "model")


@pytest.fixture(scope="module")
def by_heads(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A checkpoint under one of the masks; not to be written to."""
    root = tmp_path_factory.mktemp("by-heads")
    return cache(
        lambda mask: checkpoint_by_heads(source, root / mask.replace(" ", "-"), mask_of(mask))
    )


@pytest.fixture(scope="module")
def loaded(by_heads: Folders) -> Models:
    """It, loaded; not to be changed."""
    return cache(lambda mask: load(by_heads(mask)))


@pytest.fixture(scope="module")
def reference(source: Path) -> EagerModel:
    return EagerModel(source)


@pytest.fixture(scope="module")
def greedy(reference: EagerModel) -> Any:
    """What greedy decoding must give, by the brute force."""

    @cache
    def tokens(mask: str, *, repeating: bool = False) -> list[int]:
        prompt = REPEATING if repeating else PROMPT
        return list(reference.greedy(prompt, NEW, KINDS, **rule(mask, len(prompt))))

    return tokens


@pytest.mark.parametrize("mask", MASKS)
def test_logits_are_those_of_a_mask_for_each_head(
    mask: str, loaded: Models, reference: EagerModel
) -> None:
    """Whole, and in chunks behind a cache; some rows of the last chunk are generated ones."""
    ids, prompt, found, cached = random_ids(200, seed=5), 160, list[torch.Tensor](), None
    expected = reference.logits(ids, KINDS, **rule(mask, prompt))
    with torch.inference_mode():
        whole = loaded(mask)(torch.tensor([ids]), use_cache=False, prompt_length=prompt).logits[0]
        for piece in torch.tensor([ids]).split([1, 40, 100, 58, 1], dim=1):
            output = loaded(mask)(piece, past_key_values=cached, prompt_length=prompt)
            cached = output.past_key_values
            found.append(output.logits[0])
    assert (whole - expected).abs().max() < CLOSE
    assert (torch.cat(found) - expected).abs().max() < CLOSE
    for other in (SLIDING, FULL):
        uniform = tuple(other if kind.startswith("mixed") else kind for kind in KINDS)
        apart = reference.logits(ids, uniform, **rule(mask, prompt)) - expected
        assert apart[WINDOW + SINKS :].abs().max() > 0.1


@pytest.mark.parametrize("mask", MASKS)
def test_what_calibration_runs_is_what_ships(mask: str, source: Path, loaded: Models) -> None:
    runner, example = resident(source, mask_of(mask)), EXAMPLES[2]
    ids = torch.tensor([[*example.prompt, *example.answer[:-1]]])
    prompt = len(example.prompt)
    with torch.inference_mode():
        logits = loaded(mask)(ids, use_cache=False, prompt_length=prompt).logits[0, prompt - 1 :]
    assert nlls(runner, [example], [KINDS])[0][0] == pytest.approx(loss(logits, example), abs=CLOSE)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_every_family_parts_its_heads(family: str, eager: Models, tmp_path: Path) -> None:
    """Where layers that no plan changes stand between, they are held to themselves uncached."""
    # Of the layers that attend fully, where these have KV heads of their own.
    more = {"num_global_key_value_heads": 2} if family == "gemma4_text" else {}
    folder = make_model(tmp_path / family, family, **more)
    ids, kinds = random_ids(120), kinds_in(family)
    out = checkpoint_by_heads(folder, tmp_path / "out", mask_of("sinks"), kinds)
    hybrid = load(out, **open_source(str(folder)).family.load_exactly)
    with torch.inference_mode():
        whole = hybrid(torch.tensor([ids]), use_cache=False).logits[0]
        cached, found = None, list[torch.Tensor]()
        for piece in torch.tensor([ids]).split([70, 49, 1], dim=1):
            output = hybrid(piece, past_key_values=cached)
            cached = output.past_key_values
            found.append(output.logits[0])
    assert (torch.cat(found) - whole).abs().max() < 1e-8
    if family in FAMILIES | MORE_FAMILIES:
        expected = eager(family).logits(ids, kinds, **rule("sinks", len(ids)))
        assert (whole - expected).abs().max() < 1e-8


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"prefill_chunk_size": 17}], ids=str)
def test_greedy_decoding_is_the_definitions(
    options: dict[str, Any], mask: str, loaded: Models, greedy: Any
) -> None:
    assert generate(loaded(mask), PROMPT, **options) == greedy(mask)


@pytest.mark.parametrize("mask", MASKS)
def test_prompt_lookup_and_beams_follow_the_cache(mask: str, loaded: Models, greedy: Any) -> None:
    """The first takes tokens back out of the cache, the second reorders it."""
    looked_up = generate(loaded(mask), REPEATING, prompt_lookup_num_tokens=4)
    assert looked_up == greedy(mask, repeating=True)
    beams = {"num_beams": 3, "max_new_tokens": 10, "min_new_tokens": 10}
    cached = generate(loaded(mask), PROMPT, **beams)
    assert cached == generate(loaded(mask), PROMPT, use_cache=False, **beams)


@pytest.mark.parametrize("mask", MASKS)
def test_a_left_padded_batch_generates_what_each_prompt_generates_alone(
    mask: str, loaded: Models, greedy: Any
) -> None:
    short = random_ids(61, seed=9)
    padding = len(PROMPT) - len(short)
    batch = torch.tensor([PROMPT, [0] * padding + short])
    expected = [greedy(mask), generate(loaded(mask), short)]
    assert generate_batch(loaded(mask), batch, padding) == expected


@pytest.mark.parametrize("mask", ["plain", "sinks"])
def test_packed_sequences_give_the_logits_of_each_alone(mask: str, loaded: Models) -> None:
    lengths = (70, 1, 90)
    pieces = [random_ids(length, seed=length) for length in lengths]
    positions = torch.tensor([[i for length in lengths for i in range(length)]])
    with torch.inference_mode():
        ids = torch.tensor([list(chain(*pieces))])
        packed = loaded(mask)(ids, position_ids=positions, use_cache=False).logits[0]
        alone = [loaded(mask)(torch.tensor([piece])).logits[0] for piece in pieces]
    assert (packed - torch.cat(alone)).abs().max() < CLOSE


@pytest.mark.parametrize("mask", MASKS)
def test_a_cache_can_be_repeated_and_sorted(mask: str, loaded: Models) -> None:
    """Sequences 0, 1 become 0, 0, 1, 1, then 1, 0."""
    texts = torch.tensor([random_ids(80, seed=seed) for seed in (1, 2)])
    with torch.inference_mode():
        filled = loaded(mask)(texts, use_cache=True).past_key_values
        filled.batch_repeat_interleave(2)
        filled.batch_select_indices(torch.tensor([2, 0]))
        found = loaded(mask)(torch.tensor([[5], [6]]), past_key_values=filled).logits[:, -1]
        both = torch.cat([texts.flip(0), torch.tensor([[5], [6]])], dim=1)
        expected = loaded(mask)(both, use_cache=False, prompt_length=80).logits[:, -1]
        assert (found - expected).abs().max() < CLOSE
        filled.reset()
        assert filled.get_seq_length() == 0
        again = loaded(mask)(texts, past_key_values=filled).logits
        assert (again - loaded(mask)(texts, use_cache=False).logits).abs().max() < CLOSE


def tensors_of(layer: Any) -> list[torch.Tensor]:
    parts = getattr(layer, "parts", (layer,))
    names = ("keys", "values", "sink_keys", "sink_values")
    return [getattr(part, name) for part in parts for name in names if hasattr(part, name)]


@pytest.mark.parametrize("mask", MASKS)
def test_the_cache_holds_the_sum_over_kv_heads(mask: str, loaded: Models) -> None:
    """Everything for a full head, the window (less the current token) and the sinks for another."""
    tokens, rest = 300, mask_of(mask)
    with torch.inference_mode():
        filled = loaded(mask)(torch.tensor([random_ids(tokens)]), use_cache=True).past_key_values
    near = tokens if rest.full_attention_decode else WINDOW - 1 + rest.sink_tokens
    held = sum(count * tokens + (KV_HEADS - count) * near for count in FULL_HEADS)
    head_dim = loaded(mask).config.head_dim
    both = [states for layer in filled.layers for states in tensors_of(layer)]
    assert sum(states.numel() for states in both) == 2 * held * head_dim
    assert cache_bytes(filled) == sum(states.nbytes for states in both)
    if not rest.full_attention_decode:
        # What is kept is a view of the window with the current token, or the prompt at first.
        output = loaded(mask)(torch.tensor([[7]]), past_key_values=filled)
        both = [s for layer in output.past_key_values.layers for s in tensors_of(layer)]
        kept = sum(n * (tokens + 1) + (KV_HEADS - n) * (near + 1) for n in FULL_HEADS)
        assert sum(s.untyped_storage().nbytes() for s in both) == 2 * kept * head_dim * 8


def test_plans_are_changed_between_requests(by_heads: Folders, reference: EagerModel) -> None:
    hybrid, ids = load(by_heads("plain")), random_ids(120, seed=4)

    def check(kinds: tuple[str, ...]) -> None:
        with torch.inference_mode():
            found = hybrid(torch.tensor([ids])).logits[0]
        assert (found - reference.logits(ids, kinds, window=WINDOW)).abs().max() < CLOSE

    check(KINDS)
    with pytest.raises(ValueError, match="were not ranked"):
        hybrid.set_full_attention_layers(3)
    # Units of a ranking are layer * KV heads + head.
    hybrid.config.hybrid["ranking"] = [6, 13, 5, 7, 4, *(set(range(16)) - {4, 5, 6, 7, 13})]
    hybrid.set_full_attention_layers(3)
    check((SLIDING, "mixed_attention:1,2", SLIDING, "mixed_attention:1"))
    hybrid.set_full_attention_layers(5)
    check((SLIDING, FULL, SLIDING, "mixed_attention:1"))
    with pytest.raises(ValueError, match="0 to 16"):
        hybrid.set_full_attention_layers(17)
    hybrid.set_full_attention_layers([2])
    check((SLIDING, SLIDING, FULL, SLIDING))
    with pytest.raises(ValueError, match="some of the layers"):
        hybrid.set_full_attention_layers([LAYERS])
    assert (
        load(by_heads("plain"), full_attention_layers=[2]).config.hybrid["layer_types"][2] == FULL
    )


def test_a_cache_of_other_heads_is_refused_and_an_empty_one_is_fitted(by_heads: Folders) -> None:
    hybrid, cached = load(by_heads("sinks")), DynamicCache()
    with torch.inference_mode():
        hybrid(torch.tensor([PROMPT]), past_key_values=cached)
        hybrid.set_layer_kinds(("mixed_attention:1,2", *KINDS[1:]))
        with pytest.raises(ValueError, match="filled under another plan"):
            hybrid(torch.tensor([[5]]), past_key_values=cached)
        cached.reset()
        found = hybrid(torch.tensor([PROMPT]), past_key_values=cached).logits
        assert (found - hybrid(torch.tensor([PROMPT]), use_cache=False).logits).abs().max() < CLOSE


@pytest.mark.parametrize(
    "word", ["", "0,1,2,3", "4", "-1", "1,0", "1,1", "01", " 1", "1,", "one", "0;2"]
)
def test_a_word_that_names_no_such_heads_computes_nothing(word: str, by_heads: Folders) -> None:
    hybrid = load(by_heads("plain"))
    hybrid.set_layer_kinds((f"mixed_attention:{word}", *KINDS[1:]))
    for use_cache in (True, False):
        with pytest.raises(ValueError, match="is no kind of a layer of 4 KV heads"):
            hybrid(torch.tensor([[1, 2, 3]]), use_cache=use_cache)


def test_gradients_pass_both_kinds_of_heads(by_heads: Folders) -> None:
    hybrid, ids = load(by_heads("sinks")), torch.tensor([random_ids(140, seed=2)])
    weight, step = hybrid.model.layers[0].self_attn.k_proj.weight, 1e-6
    (slope,) = torch.autograd.grad(hybrid(ids, labels=ids).loss, weight)
    direction = slope / slope.norm()
    with torch.no_grad():
        weight += step * direction
        above = float(hybrid(ids, labels=ids).loss)
        weight -= 2 * step * direction
        below = float(hybrid(ids, labels=ids).loss)
    assert all(head.abs().max() > 0 for head in slope.chunk(KV_HEADS))
    assert (above - below) / (2 * step) == pytest.approx(float(slope.norm()), rel=1e-5)
