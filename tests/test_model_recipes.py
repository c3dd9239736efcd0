"""The recipes for real models fit those models' published configurations, and state true figures.

`tests/published_configs/` holds the configurations; each file says where it was seen. The numbers
of parameters are what the models' pages state: they hold a configuration to the real model.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks.recipe_memory import CONFIGS, RECIPES, expected_lines, memory_of
from benchmarks.sparse_model import write_sparse_model
from converter.common.resources import recipe_notes
from converter.model.dimensions import read_shape
from converter.model.families import FAMILIES
from converter.plan.memory import ExpectedMemory
from converter.settings import build_settings, read_recipe
from tests.conftest import run_cli

MODELS = sorted(path.stem for path in CONFIGS.glob("*.json"))
# Layers built below: a layer is like any other.
BUILT_LAYERS = 4


@cache
def published(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def test_every_published_model_has_a_recipe_and_the_other_way_round() -> None:
    with_source = {path.stem for path in RECIPES.glob("*.toml") if "source" in read_recipe(path)}
    assert with_source == set(MODELS)
    assert len(MODELS) == 14


@pytest.mark.parametrize("name", MODELS)
def test_the_tensors_we_expect_are_the_published_number_of_parameters(name: str) -> None:
    found = published(name)
    config = found["config"]
    tensors = FAMILIES[config["model_type"]].expected_tensors(config, read_shape(config, name))
    assert sum(math.prod(size) for size in tensors.values()) == found["parameters"]
    assert found["config_as_seen_in"]


def meta_tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    """What transformers' own class for a config holds, built without memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_the_tensors_we_expect_are_those_of_the_models_own_class(name: str, tmp_path: Path) -> None:
    config = {key: value for key, value in published(name)["config"].items() if key != "auto_map"}
    config |= {"num_hidden_layers": BUILT_LAYERS}
    if "no_rope_layers" in config:
        config["no_rope_layers"] = config["no_rope_layers"][:BUILT_LAYERS]
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = FAMILIES[config["model_type"]].expected_tensors(config, read_shape(config, name))
    built = meta_tensors(tmp_path)
    if config["model_type"] == "qwen3_moe":
        # The class holds all experts of a layer in one tensor; the files hold them one by one.
        assert {n: s for n, s in expected.items() if ".experts." not in n} == {
            n: s for n, s in built.items() if ".experts." not in n
        }
        assert sum(map(math.prod, expected.values())) == sum(map(math.prod, built.values()))
    else:
        assert expected == built


@pytest.mark.parametrize("name", MODELS)
def test_a_recipe_plans_its_model(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole published size, with files that are holes: sizes, form and plan, but no numbers."""
    found = published(name)
    model = tmp_path / "model"
    model.mkdir()
    # A folder like the Hub's, but for the models' own code, which no conversion reads.
    stored = write_sparse_model(model, found["config"], shards=2)
    assert stored == 2 * found["parameters"]
    recipe = read_recipe(RECIPES / f"{name}.toml")
    assert recipe["source"] == found["model"]
    plan = ("plan", model, "--recipe", name, "--method", "periodic", "--json")
    assert run_cli(*plan) == 0
    told = json.loads(capsys.readouterr().out)
    layers = found["config"]["num_hidden_layers"]
    assert len(told["full_attention_layers"]) == -(-layers // 4)
    cost = memory_of(found["config"], build_settings(recipe, (), {}, name))
    assert told["kv_bytes"]["full"] == cost.kv_full_bytes
    assert told["kv_bytes"]["hybrid"] == cost.kv_hybrid_bytes
    native = "runs natively" in recipe_notes(RECIPES / f"{name}.toml").summary
    out = tmp_path / "out"
    layers_text = ",".join(map(str, told["full_attention_layers"]))
    options = ("--layers", layers_text, "--window", recipe["window"], "-q")
    assert run_cli("convert", model, out, *options) == 0
    written = json.loads((out / "config.json").read_text())
    assert written["model_type"].startswith("hybrid_") is (not native)
    assert written["layer_types"].count("full_attention") == -(-layers // 4)


@pytest.mark.parametrize("name", MODELS)
def test_a_recipe_states_what_the_formula_gives(name: str) -> None:
    text = (RECIPES / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    assert [line for line in text if line.startswith("# expected:")] == expected_lines(name)
    assert recipe_notes(RECIPES / f"{name}.toml").measured == "no"


def test_the_formula_by_hand() -> None:
    """Qwen3-0.6B by arithmetic on its published sizes."""
    settings = build_settings({"window": 2048, "length": 16384}, (), {}, "test")
    activations = 16384 * (4 * 1024 + 3 * 3072) * 2
    assert memory_of(published("qwen3-0.6b")["config"], settings) == ExpectedMemory(
        weight_bytes=2 * 596049920,
        kv_full_bytes=28 * 40960 * 4096,
        kv_hybrid_bytes=(7 * 40960 + 21 * 2048) * 4096,
        context_tokens=40960,
        measuring_bytes=2 * 596049920 + activations,
        proving_bytes=4 * 596049920,
        proving_dtype="float32",
    )
