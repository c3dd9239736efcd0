"""Folders as transformers loads, saves, switches, fills and refuses them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, pipeline

from tests.brute_force import FULL, EagerModel
from tests.conftest import FAMILIES, LAYERS, Folders, Greedy, Models, make_model
from tests.hybrids import (
    EQUAL,
    EVERY,
    KEPT,
    MASKS,
    NEW,
    PLAN,
    PROMPT,
    SINKS,
    WINDOW,
    convert,
    generate,
    load,
    random_ids,
)


@pytest.mark.parametrize(("family", "mask"), EVERY)
def test_saving_and_loading_again_changes_nothing(
    family: str, mask: str, model: Models, greedy: Greedy, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    model(family, mask).save_pretrained(again)
    assert (again / "modeling_hybrid.py").is_file()
    loaded = load(again)
    assert loaded.config.layer_types == PLAN
    assert generate(loaded, PROMPT) == greedy(family, mask)
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        apart = (loaded(ids).logits - model(family, mask)(ids).logits).abs().max()
    assert apart <= EQUAL


def test_an_altered_file_serves_its_own_model_alone(
    checkpoint: Folders, model: Models, tmp_path: Path
) -> None:
    """A process may hold checkpoints whose code differs; transformers knows attention by name."""
    folder = Path(shutil.copytree(checkpoint("qwen3", "sinks"), tmp_path / "altered"))
    code, window = folder / "modeling_masks.py", "(p > q - window)"
    text = code.read_text()
    assert text.count(window) == 1
    code.write_text(text.replace(window, "(p > q - window - 1)"))
    ours, ids = model("qwen3", "sinks"), torch.tensor([PROMPT])
    with torch.inference_mode():
        before = ours(ids).logits
        altered = load(folder)
        apart = (altered(ids).logits - before).abs().max()
        assert apart > 1e-3
        assert (ours(ids).logits - before).abs().max() <= EQUAL
        assert (load(checkpoint("qwen3", "sinks"))(ids).logits - before).abs().max() <= EQUAL
        assert (altered(ids).logits - before).abs().max() == apart


@pytest.mark.parametrize(("family", "mask"), EVERY)
def test_switching_the_plan_is_a_checkpoint_with_that_plan(
    family: str, mask: str, checkpoint: Folders
) -> None:
    switched, written = load(checkpoint(family, mask)), load(checkpoint(family, mask, (0,)))
    ids = torch.tensor([random_ids(200, seed=4)])
    with torch.inference_mode():
        before = switched(ids).logits
        switched.set_full_attention_layers([0])
        assert (switched(ids).logits - written(ids).logits).abs().max() <= EQUAL
        assert generate(switched, PROMPT) == generate(written, PROMPT)
        switched.set_full_attention_layers(list(KEPT))
        assert (switched(ids).logits - before).abs().max() <= EQUAL
        assert (before - written(ids).logits).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_of_one_token_is_exact(
    family: str, sources: dict[str, Path], eager: Models, tmp_path: Path
) -> None:
    hybrid = load(convert(sources[family], tmp_path / "one", "sinks", window=1))
    expected = eager(family).greedy(PROMPT, 6, PLAN, window=1, sinks=SINKS)
    assert generate(hybrid, PROMPT, max_new_tokens=6, min_new_tokens=6) == expected
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(ValueError, match="window of at least 2"):
        hybrid(torch.tensor([[1, 2, 3, 4, 5]]), position_ids=positions)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_a_sliding_layer_is_the_source(
    family: str, checkpoint: Folders, eager: Models
) -> None:
    hybrid = load(checkpoint(family, "sinks", tuple(range(LAYERS))))
    ids = random_ids(200)
    with torch.inference_mode():
        found = hybrid(torch.tensor([ids])).logits[0]
    assert (found - eager(family).logits(ids, [FULL] * LAYERS, window=1)).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_window_needs_none_of_our_code(
    family: str, checkpoint: Folders, greedy: Greedy
) -> None:
    native = load(checkpoint(family, "plain"), trust_remote_code=False)
    assert "Hybrid" not in type(native).__name__
    assert generate(native, PROMPT) == greedy(family, "plain")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipeline_runs_a_plain_window(family: str, checkpoint: Folders, greedy: Greedy) -> None:
    """Pipelines look for the architecture among transformers' classes, and it is none of them."""
    generator = pipeline("text-generation", model=str(checkpoint(family, "plain")))
    native = generator.model.to(torch.float64)
    assert "Hybrid" not in type(native).__name__
    assert generate(native, PROMPT) == greedy(family, "plain")


@pytest.mark.parametrize("mask", list(MASKS)[1:])
def test_the_model_for_vllm_is_for_vllm_and_for_windows_alone(
    mask: str, checkpoint: Folders
) -> None:
    config = AutoConfig.from_pretrained(checkpoint("llama", mask), trust_remote_code=True)
    for backend in ("sdpa", "sglang"):
        config._attn_implementation_internal = backend
        with pytest.raises(ValueError, match="load it with AutoModelForCausalLM"):
            AutoModel.from_config(config, trust_remote_code=True)
    config._attn_implementation_internal = "vllm"
    with pytest.raises(ValueError, match="without --sinks and --full-decode"):
        AutoModel.from_config(config, trust_remote_code=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mask", list(MASKS)[1:])
def test_another_mask_is_refused_without_trust(family: str, mask: str, checkpoint: Folders) -> None:
    with pytest.raises(ValueError, match=r"trust_remote_code=True|does not recognize this arch"):
        load(checkpoint(family, mask), trust_remote_code=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_backends_are_exact_for_a_window_and_refused_for_other_masks(
    family: str, checkpoint: Folders, greedy: Greedy
) -> None:
    plain = load(checkpoint(family, "plain"))
    for backend in ("sdpa", "eager"):
        plain.set_attn_implementation(backend)
        assert plain.config._attn_implementation == backend
        assert generate(plain, PROMPT) == greedy(family, "plain")
    for mask in list(MASKS)[1:]:
        hybrid = load(checkpoint(family, mask))
        for backend in ("sdpa", "eager", "flex_attention"):
            with pytest.raises(ValueError, match="leave attn_implementation out"):
                hybrid.set_attn_implementation(backend)
        with pytest.raises(ValueError, match="leave attn_implementation out"):
            load(checkpoint(family, mask), attn_implementation="flex_attention")
        assert generate(hybrid, PROMPT) == greedy(family, mask)


@pytest.mark.parametrize("mask", MASKS)
def test_a_static_cache_is_refused(mask: str, model: Models) -> None:
    with pytest.raises(ValueError, match=r"needs a DynamicCache, not a .*Static"):
        generate(model("llama", mask), PROMPT, cache_implementation="static")


def test_a_four_dimensional_mask_is_refused(model: Models) -> None:
    ids = torch.tensor([PROMPT])
    with pytest.raises(ValueError, match="pass a 2-D attention_mask"):
        model("qwen3", "plain")(ids, attention_mask=torch.ones(1, 1, len(PROMPT), len(PROMPT)))


def test_a_cache_filled_under_another_plan_is_refused(checkpoint: Folders) -> None:
    hybrid = load(checkpoint("qwen2", "plain"))
    with torch.inference_mode():
        cache = hybrid(torch.tensor([PROMPT]), use_cache=True).past_key_values
        hybrid.set_full_attention_layers(list(range(LAYERS)))
        with pytest.raises(ValueError, match="filled under another plan"):
            hybrid(torch.tensor([[5]]), past_key_values=cache)


def test_the_config_of_a_biased_llama_takes_the_custom_form_and_is_exact(tmp_path: Path) -> None:
    source = make_model(tmp_path / "biased", "llama", attention_bias=True, mlp_bias=True)
    out = convert(source, tmp_path / "out", "plain")
    assert json.loads((out / "config.json").read_text())["model_type"] == "hybrid_llama"
    expected = EagerModel(source).greedy(PROMPT, NEW, PLAN, window=WINDOW)
    assert generate(load(out), PROMPT) == expected
