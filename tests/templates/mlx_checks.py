"""mlx-lm computes the plan: its logits against the same checkpoint in transformers.

`test_mlx.py` runs this file in a process of its own. mlx's CPU build runs on Linux and macOS.
"""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from itertools import accumulate, pairwise, product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy
import pytest
import torch
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from converter.checkpoint.format import MLX_FILE
from converter.checkpoint.reader import open_checkpoint
from converter.engines.support import verdicts
from tests.conftest import Folders, Greedy, make_model
from tests.hybrids import NEW, PROMPT, SINKS, WINDOW, convert, load, random_ids

# How far mlx's float32 may be from transformers' (the issue's limit).
LIMIT = 1e-3
LENGTH = 160
FORMS = list(product(["llama", "mistral", "qwen2", "qwen3"], ["plain", "sinks"]))
every_form = pytest.mark.parametrize("form", FORMS, ids=" ".join)
IDS = random_ids(LENGTH, seed=11)


def load_mlx(folder: Path, *, trust: bool = True) -> Any:
    """The checkpoint as mlx-lm loads it, in float32 on the CPU."""
    mx.set_default_device(mx.cpu)
    model, _ = load_model(folder, trust_remote_code=trust)
    model.set_dtype(mx.float32)
    return model


def logits_of(model: Any, pieces: list[list[int]]) -> Any:
    """Logits of every row, fed piece by piece through one cache."""
    cache = make_prompt_cache(model)
    rows = [model(mx.array([piece]), cache=cache)[0] for piece in pieces]
    return numpy.array(mx.concatenate(rows).astype(mx.float32))


def reference(folder: Path) -> Any:
    """The HF hybrid through its own code, in float32."""
    model = load(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([IDS])).logits[0].numpy()


def split(sizes: tuple[int, ...]) -> list[list[int]]:
    edges = [0, *accumulate(sizes), *range(sum(sizes) + 1, LENGTH + 1)]
    return [IDS[begin:end] for begin, end in pairwise(edges)]


# One pass; chunks that end inside and past the window, then token by token; all token by token.
FEEDS = {
    "at once": (LENGTH,),
    "in chunks, then token by token": (10, WINDOW, 7, 60, 2),
    "token by token": (),
}


@every_form
def test_logits_are_those_of_the_checkpoint_in_transformers(
    form: tuple[str, str], checkpoint: Folders
) -> None:
    folder = checkpoint(*form)
    expected, model = reference(folder), load_mlx(folder)
    for name, sizes in FEEDS.items():
        worst = abs(logits_of(model, split(sizes)) - expected).max()
        assert worst < LIMIT, (name, worst)


@every_form
def test_a_window_wrong_by_one_would_be_seen(
    form: tuple[str, str], checkpoint: Folders, tmp_path: Path
) -> None:
    """The comparison can fail: another window, and no window, are far beyond the limit."""
    folder = checkpoint(*form)
    expected = reference(folder)
    for window in (WINDOW - 1, LENGTH):
        other = Path(shutil.copytree(folder, tmp_path / str(window)))
        config = json.loads((other / "config.json").read_text())
        config["sliding_window"] = window
        config["hybrid"]["mask"]["window_tokens"] = window
        (other / "config.json").write_text(json.dumps(config))
        apart = abs(logits_of(load_mlx(other), split((LENGTH,))) - expected).max()
        assert apart > 10 * LIMIT, (window, apart)


@every_form
def test_a_sliding_layer_caches_its_window_and_sinks_only(
    form: tuple[str, str], checkpoint: Folders
) -> None:
    model = load_mlx(checkpoint(*form))
    cache = make_prompt_cache(model)
    for piece in split((100,)):
        mx.eval(model(mx.array([piece]), cache=cache))
    sizes = [layer.keys.shape[2] for layer in cache]
    held = WINDOW + (SINKS if form[1] == "sinks" else 0)
    assert sizes[0] == sizes[3] == held
    assert min(sizes[1], sizes[2]) >= LENGTH


@every_form
def test_greedy_generation_is_that_of_transformers(
    form: tuple[str, str], checkpoint: Folders, greedy: Greedy
) -> None:
    """mlx-lm's own generation loop, with its own prefill chunks and cache."""
    steps = generate_step(
        mx.array(PROMPT), load_mlx(checkpoint(*form)), max_tokens=NEW, prefill_step_size=40
    )
    assert [int(token) for token, _ in steps] == greedy(*form)


@every_form
def test_the_table_says_what_needs_trust_and_without_it_that_is_refused(
    form: tuple[str, str], checkpoint: Folders
) -> None:
    folder = checkpoint(*form)
    source, plan = open_checkpoint(folder)
    verdict = next(v for v in verdicts(source, plan.mask) if v.engine == "mlx-lm")
    own = form not in (("llama", "plain"), ("mistral", "plain"))
    assert verdict.word == ("needs a flag" if own else "honoured")
    assert ("--trust-remote-code" in str(verdict.command)) is own
    assert (folder / MLX_FILE).exists() is own
    with pytest.raises(ValueError, match="trust_remote_code") if own else nullcontext():
        load_mlx(folder, trust=False)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_full_attention_in_decode_is_refused(family: str, checkpoint: Folders) -> None:
    with pytest.raises(ValueError, match="hybrid_"):
        load_mlx(checkpoint(family, "full decode"))


def test_a_family_without_a_file_for_mlx_is_refused(tmp_path: Path) -> None:
    out = convert(make_model(tmp_path / "olmo2", "olmo2"), tmp_path / "out", "plain")
    with pytest.raises(ValueError, match="hybrid_olmo2 not supported"):
        load_mlx(out)


def test_a_plan_that_is_missing_is_refused(checkpoint: Folders, tmp_path: Path) -> None:
    other = Path(shutil.copytree(checkpoint("qwen3", "plain"), tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    del config["layer_types"]
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no plan"):
        load_mlx(other)
