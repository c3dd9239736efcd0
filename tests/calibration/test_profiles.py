"""One checkpoint, every plan: budgets by ranking and profiles by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from converter.plan.plan import load_plan
from tests.conftest import LAYERS, run_cli

RANKING = [2, 0, 3, 1]
PROFILES = {"code": (1,), "chat": (0, 3)}


def write_plan(sources: dict[str, Path], path: Path, layers: str, *options: str) -> Path:
    arguments = ("--layers", layers, "--window", "16", *options, "--out", path, "-q")
    assert run_cli("plan", sources["qwen3"], *arguments) == 0
    return path


@pytest.fixture
def convert(sources: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    code = write_plan(sources, tmp_path / "code.json", "1")
    chat = write_plan(sources, tmp_path / "chat.json", "0,3")
    plan = write_plan(sources, tmp_path / "plan.json", "2")
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"ranking": RANKING}))
    profiles = ("--profile", f"code={code}", "--profile", f"chat={chat}")

    def run(*options: object) -> Path:
        arguments = (sources["qwen3"], tmp_path / "out", "--plan", plan, *profiles, *options)
        assert run_cli("convert", *arguments, "-q") == 0
        return tmp_path / "out"

    return run


def load(folder: Path, **choice: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float64, **choice
    )


def full_layers(model: Any) -> list[int]:
    return [i for i, kind in enumerate(model.config.layer_types) if kind == "full_attention"]


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(0, 250, (1, 120), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        result: torch.Tensor = model(ids, use_cache=False).logits
    return result


def test_a_checkpoint_with_profiles_verifies_records_them_and_keeps_them_when_retargeted(
    convert: Callable[..., Path],
) -> None:
    out = convert("--verify")
    assert load_plan(out / "hybrid" / "plan.json").profiles == PROFILES
    assert "profile `chat`" in (out / "README.md").read_text()
    assert run_cli("retarget", out, "--layers", "3", "-q") == 0
    assert load_plan(out / "hybrid" / "plan.json").profiles == PROFILES
    assert full_layers(load(out, profile="code")) == [1]


def test_from_pretrained_takes_a_count_indices_or_a_profile(convert: Callable[..., Path]) -> None:
    out = convert()
    assert full_layers(load(out)) == [2]
    for count in range(LAYERS + 1):
        assert full_layers(load(out, full_attention_layers=count)) == sorted(RANKING[:count])
    assert full_layers(load(out, full_attention_layers=[3, 1])) == [1, 3]
    assert full_layers(load(out, profile="chat")) == [0, 3]


def test_a_switched_model_computes_what_a_checkpoint_of_that_plan_does(
    convert: Callable[..., Path], sources: dict[str, Path], tmp_path: Path
) -> None:
    model = load(convert())
    alone = tmp_path / "alone"
    options = ("--layers", "0,3", "--window", "16", "-q")
    assert run_cli("convert", sources["qwen3"], alone, *options) == 0
    first = logits(model)
    model.set_profile("chat")
    assert (logits(model) - logits(load(alone))).abs().max() <= 1e-10
    model.set_full_attention_layers(1)
    assert (logits(model) - first).abs().max() <= 1e-10
    model.set_full_attention_layers(LAYERS)
    original = AutoModelForCausalLM.from_pretrained(sources["qwen3"], dtype=torch.float64)
    assert (logits(model) - logits(original)).abs().max() <= 1e-10


def test_wrong_choices_are_refused(convert: Callable[..., Path]) -> None:
    model = load(convert())
    with pytest.raises(ValueError, match="expected a profile"):
        model.set_profile("poetry")
    with pytest.raises(ValueError, match="full-attention layers"):
        model.set_full_attention_layers(LAYERS + 1)
    with pytest.raises(ValueError, match="expected some of the layers"):
        model.set_full_attention_layers([LAYERS])


def test_run_uses_the_plan_it_is_asked_for(
    convert: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = convert()
    found = []
    for choice in ((), ("--profile", "chat"), ("--full-layers", LAYERS)):
        capsys.readouterr()
        options = ("--prompt", "a" * 100, "--max-new", 2, "--json", "-q")
        assert run_cli("run", out, *options, *choice) == 0
        found.append(json.loads(capsys.readouterr().out))
    own, chat, every = found
    assert own["cache_bytes"] < chat["cache_bytes"]
    assert every["cache_bytes"] == every["full_cache_bytes"]


def test_a_profile_of_another_mask_or_without_a_name_is_refused(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_plan(sources, tmp_path / "other.json", "1", "--sinks", "2")
    for profile, words in ((f"other={other}", "another mask"), ("plan.json", "NAME=FILE")):
        options = ("--layers", "1", "--window", "16", "--profile", profile)
        assert run_cli("convert", sources["qwen3"], tmp_path / "out", *options) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
