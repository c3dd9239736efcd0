"""Real small models in llama.cpp, where they lie beside the checkout."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from converter.engines.gguf.container import read_container
from converter.engines.gguf.llama_cpp import LlamaCppSettings
from converter.engines.gguf.run import GgufRunner
from converter.inference.completion import GenerationSettings
from tests.conftest import run_cli, shared
from tests.ggufs import Files, Told, exported, loaded_gguf, logits_of

pytestmark = pytest.mark.shared

MODELS = {
    "stories260K": "granite_swa",
    "stories260K-qwen2": "step35",
    "stories260K-mistral": "granite_swa",
    "stories3M-qwen3": "step35",
}
WINDOW, LAYERS = 32, "1,3"


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A checkpoint of each model; not to be changed."""
    root = tmp_path_factory.mktemp("shared-gguf")

    def convert(name: str) -> Path:
        options = ("--layers", LAYERS, "--window", WINDOW, "-q", "--json")
        assert run_cli("convert", shared(f"models/{name}"), root / name, *options) == 0
        return root / name

    return cache(convert)


@pytest.fixture(scope="module")
def gguf(hybrid: Files, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Each of them as GGUF."""
    root = tmp_path_factory.mktemp("shared-files")

    @cache
    def export(name: str, kind: str = "f32") -> Path:
        return exported(hybrid(name), root / f"{name}-{kind}.gguf", "--type", kind)

    return export


def tokenizer_of(folder: Path) -> Any:
    """tokenizer.json itself: transformers reads a qwen2 folder's as another tokenizer."""
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


def story(folder: Path, count: int) -> list[int]:
    text = shared("texts/tinystories_sample_2MiB.txt").read_text(encoding="utf-8")
    text = text.replace("\r\n", "\n").split("<|endoftext|>")[3].strip()
    ids = tokenizer_of(folder).encode(text * 4)[:count]
    assert len(ids) == count
    return ids


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", MODELS)
def test_logits_over_a_story_many_windows_long(
    name: str, hybrid: Files, gguf: Files, told: Told
) -> None:
    assert told("verify", gguf(name), "--against", hybrid(name))["ok"] is True
    ids = story(hybrid(name), 500)
    with torch.inference_mode():
        expected = loaded(hybrid(name))(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    arch = read_container(gguf(name)).arch
    assert arch == MODELS[name]
    planned = logits_of(gguf(name), ids)
    full = logits_of(gguf(name), ids, **{f"{arch}.attention.sliding_window": 1 << 20})
    assert numpy.abs(planned - expected).max() < 1e-3
    assert numpy.abs(planned[:WINDOW] - full[:WINDOW]).max() < 1e-3
    assert numpy.abs(planned - full).max() > 1


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_equal(name: str, hybrid: Files, gguf: Files) -> None:
    tokenizer, model = tokenizer_of(hybrid(name)), loaded(hybrid(name))
    prompt = tokenizer.decode(story(hybrid(name), 200), skip_special_tokens=True)
    ids = torch.tensor([tokenizer.encode(prompt)])
    options = {"max_new_tokens": 150, "do_sample": False, "pad_token_id": 0}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()
    before = tokenizer.decode(output[: ids.shape[1]], skip_special_tokens=True)
    whole = tokenizer.decode(output, skip_special_tokens=True)
    with GgufRunner(gguf(name), GenerationSettings(150), warn=print) as runner:
        done = runner.complete(prompt, is_chat=False, show=lambda _piece: None)
    assert done.prompt_tokens == ids.shape[1]
    # The tokenizer's own decoding leaves out the space in front of a text.
    assert whole == before + done.text


@pytest.mark.parametrize("name", ["stories260K", "stories3M-qwen3"])
def test_quantised_models_write_stories_nearly_as_well(
    name: str, hybrid: Files, gguf: Files
) -> None:
    """Loss in nats per token: eight bits cost next to nothing, four a little."""
    ids = story(hybrid(name), 400)
    whole = loss(gguf(name), ids)
    assert 0.5 < whole < 3
    for kind, limit in {"q8_0": 0.02, "q6_k": 0.05, "q4_k_m": 0.3}.items():
        assert abs(loss(gguf(name, kind), ids) - whole) < limit


def loss(file: Path, ids: list[int]) -> float:
    with loaded_gguf(file, LlamaCppSettings(len(ids), exact=True)) as engine:
        logits = engine.feed(ids, range(len(ids))).astype(numpy.float64)
    logits -= logits.max(axis=1, keepdims=True)
    log_probabilities = logits - numpy.log(numpy.exp(logits).sum(axis=1, keepdims=True))
    return float(-log_probabilities[range(len(ids) - 1), ids[1:]].mean())
