"""What benchmarks compare on their models, and how those are grown."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from converter.calibration.data.examples import Examples
from converter.model.mask import Mask
from converter.model.source import open_source
from converter.plan.units import Units
from tests import runners
from tests.conftest import make_model

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import compare_selectors  # noqa: E402
import growing  # noqa: E402
import model_quality  # noqa: E402
from rival_selectors import EVERY_SELECTOR  # noqa: E402

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "partial_rotary_factor": 1.0,
    },
    "pad_token_id": 0,
    "eos_token_id": 0,
}


@pytest.mark.parametrize(("budget", "count"), [("1/8", 1), ("1/2", 3), ("4", 4)])
def test_a_budget_is_a_share_rounded_up_or_a_count(budget: str, count: int) -> None:
    assert compare_selectors.kept(budget, 5) == count


def test_plans_are_of_the_layers_that_attend(tmp_path: Path) -> None:
    source = open_source(str(make_model(tmp_path, "qwen3_5_text")))
    run: Any = SimpleNamespace(source=source, units=Units(2))
    found = compare_selectors.candidates_of(run, 1, {"lazy": ((3,), None)})
    assert found == {
        "lazy": (3,),
        "periodic, offset 0": (1,),
        "periodic, offset 1": (3,),
        "plan (1,)": (1,),
        "plan (3,)": (3,),
    }


def test_every_way_chooses_and_says_what_it_cost(tmp_path: Path) -> None:
    source, names = make_model(tmp_path, "qwen3_5_text"), ("two-sided", "greedy", "guided", "lazy")
    run = runners.run(source, runners.EXAMPLES, Mask(16), tmp_path / "work")
    run = replace(run, examples=Examples(runners.EXAMPLES, runners.EXAMPLES, ()))
    found = compare_selectors.choices_of(run, 1, [EVERY_SELECTOR[name] for name in names])
    assert found.keys() == {*names, "best"}
    for layers, cost in found.values():
        assert layers in {(1,), (3,)}
        assert cost


def test_a_grown_model_attends_as_the_trained_one_did(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trained = Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=2, **SIZES))
    for name, parameter in trained.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    trained.save_pretrained(tmp_path)
    kinds = ["full_attention"] * 2
    grown = Qwen3_5ForCausalLM(Qwen3_5TextConfig(num_hidden_layers=2, layer_types=kinds, **SIZES))
    growing.grow(grown, tmp_path)
    tokens = torch.randint(64, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(grown(tokens).logits, trained(tokens).logits)
    assert list(model_quality.attending(grown)) == [0, 1]


def test_a_window_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    kinds = ["full_attention"] * 2
    Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=2, **SIZES)).save_pretrained(tmp_path)
    grown = Qwen3_5ForCausalLM(Qwen3_5TextConfig(num_hidden_layers=2, layer_types=kinds, **SIZES))
    growing.grow(grown, tmp_path)
    grown.set_attn_implementation("plain_training")
    model_quality.set_windows(grown, [3, None])
    sliding = Qwen3ForCausalLM.from_pretrained(
        tmp_path,
        layer_types=["sliding_attention", "full_attention"],
        use_sliding_window=True,
        sliding_window=3,
        attn_implementation="eager",
    )
    tokens = torch.randint(64, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(grown(tokens).logits, sliding(tokens).logits)


def test_recurrent_layers_keep_their_own_weights_and_the_trained_mlp(tmp_path: Path) -> None:
    trained = Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=2, **SIZES))
    trained.save_pretrained(tmp_path)
    grown = Qwen3_5ForCausalLM(
        Qwen3_5TextConfig(num_hidden_layers=2, full_attention_interval=2, **SIZES)
    )
    growing.grow(grown, tmp_path)
    assert list(model_quality.attending(grown)) == [1]
    theirs, own = trained.model.layers[0].mlp, grown.model.layers[0].mlp
    torch.testing.assert_close(own.up_proj.weight, theirs.up_proj.weight)


def test_twins_share_a_trained_layers_attention(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trained = Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=2, **SIZES))
    trained.save_pretrained(tmp_path)
    grown = Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=6, **SIZES))
    growing.grow(grown, tmp_path, twins=True)
    for number, theirs in enumerate(trained.model.layers):
        twins = grown.model.layers[3 * number : 3 * number + 2]
        for own in twins:
            torch.testing.assert_close(own.self_attn.k_proj.weight, theirs.self_attn.k_proj.weight)
        shared = sum(own.self_attn.o_proj.weight for own in twins)
        torch.testing.assert_close(shared, theirs.self_attn.o_proj.weight)
        torch.testing.assert_close(twins[1].mlp.down_proj.weight, theirs.mlp.down_proj.weight)
        assert twins[0].mlp.down_proj.weight.abs().max() < 0.02
