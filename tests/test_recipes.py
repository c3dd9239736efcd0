"""The recipes that ship: each is good, says what it is for, and fits the model that it names.

`tests/published_configs/` holds those models' configurations; each file says where it was seen. The
numbers of parameters are what the models' pages state: they hold a configuration to the real model.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks.recipe_memory import CONFIGS, RECIPES, expected_line
from benchmarks.sparse_model import write_sparse_model
from converter.common.resources import (
    read_recipe,
    recipe_names,
    recipe_notes,
    recipe_path,
    resource_dir,
)
from converter.common.units import human_bytes
from converter.model.families import FAMILIES
from converter.plan.budget import parse_budget
from converter.settings import build_settings
from tests.cli.test_convert import run_json
from tests.conftest import run_cli

MODELS = sorted(path.stem for path in CONFIGS.glob("*.json"))
# Layers built below: a layer is like any other.
BUILT_LAYERS = 4


def test_every_recipe_that_ships_is_listed_with_its_summary() -> None:
    files = sorted(path.name for path in resource_dir("recipes").iterdir())
    assert files == [f"{name}.toml" for name in recipe_names()] != []
    listed = {
        recipe["name"]: recipe["summary"] for recipe in run_json("recipes", "list")["recipes"]
    }
    assert listed == {name: recipe_notes(recipe_path(name)).summary for name in recipe_names()}
    assert min(map(len, listed.values())) > 20


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_is_good_and_shown_whole(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = build_settings(read_recipe(recipe_path(name)), (), {}, name)
    assert settings.layers is not None or str(parse_budget(str(settings.budget))) == settings.budget
    assert run_json("recipes", "check", name)["ok"] is True
    text = recipe_path(name).read_text(encoding="utf-8").rstrip() + "\n"
    assert text.startswith("# ")
    assert "window = " in text
    assert run_cli("recipes", "show", name) == run_cli("recipes", "check", name) == 0
    assert capsys.readouterr().out == f"{text}{name}.toml: every key and value is good\n"


def test_a_recipe_of_ones_own_reaches_the_plan(sources: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('# mine\nmethod = "periodic"\nbudget = "1/2"\nwindow = 16\noffset = 1\n')
    assert recipe_path(str(path)) == path
    assert recipe_notes(path).summary == "mine"
    command = ("plan", sources["qwen3"], "--recipe", path)
    first = run_json(*command)
    assert first["full_attention_layers"] == [1, 3]
    assert (first["mask"]["window_tokens"], first["budget"]) == (16, "1/2")
    second = run_json(*command, "--set", "window=32", "--offset", "0")
    assert second["full_attention_layers"] == [0, 2]
    assert second["mask"]["window_tokens"] == 32


# --- recipes for published models -------------------------------------------------------------


@cache
def published(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def test_every_published_model_has_a_recipe_and_the_other_way_round() -> None:
    with_source = {path.stem for path in RECIPES.glob("*.toml") if "source" in read_recipe(path)}
    assert with_source == set(MODELS)
    assert len(MODELS) == 23


@pytest.mark.parametrize("name", MODELS)
def test_the_tensors_we_expect_are_the_published_number_of_parameters(name: str) -> None:
    found = published(name)
    config = found["config"]
    family = FAMILIES[config["model_type"]]
    tensors = family.expected_tensors(config, family.dimensions(config, name))
    # Parts that see or draft are published with some models.
    held = sum(map(math.prod, tensors.values()))
    assert held + sum(found_beside(name).values()) == found["parameters"]
    assert found["config_as_seen_in"]


def meta_tensors(folder: Path, auto_class: str) -> dict[str, tuple[int, ...]]:
    """What transformers' own class for a config holds, built without memory."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    with torch.device("meta"):
        model = getattr(transformers, auto_class).from_config(config)
    held = dict(model.named_parameters())
    held |= {name: b for name, b in model.named_buffers() if name.endswith("correction_bias")}
    return {name: tuple(tensor.shape) for name, tensor in held.items()}


def found_beside(name: str) -> dict[str, int]:
    """Parameters of a published model that are not its language model's."""
    beside: dict[str, int] = published(name).get("parameters_beside", {})
    return beside


@pytest.mark.parametrize("name", MODELS)
def test_the_tensors_we_expect_are_those_of_the_models_own_class(name: str, tmp_path: Path) -> None:
    config = {key: value for key, value in published(name)["config"].items() if key != "auto_map"}
    family = FAMILIES[config["model_type"]]
    by_layer = {
        key: family.language(config)[key][:BUILT_LAYERS]
        for key in ("no_rope_layers", "layer_types")
        if key in family.language(config)
    }
    config = family.with_language(config, num_hidden_layers=BUILT_LAYERS, **by_layer)
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = family.expected_tensors(config, family.dimensions(config, name))
    built = meta_tensors(tmp_path, family.auto_class)
    sees = {name: size for name, size in built.items() if name.startswith("model.visual.")}
    assert sum(map(math.prod, sees.values())) == found_beside(name).get("vision", 0)
    built = {name: size for name, size in built.items() if name not in sees}
    if family.load_exactly:
        # The class holds all experts of a layer in one tensor; the files hold them one by one.
        assert {n: s for n, s in expected.items() if ".experts." not in n} == {
            n: s for n, s in built.items() if ".experts." not in n
        }
        assert sum(map(math.prod, expected.values())) == sum(map(math.prod, built.values()))
    else:
        assert expected == built


@pytest.mark.parametrize("name", MODELS)
def test_a_recipe_plans_its_model(name: str, tmp_path: Path) -> None:
    """The whole published size, with files that are holes: sizes, form and plan, but no numbers."""
    found = published(name)
    model = tmp_path / "model"
    model.mkdir()
    # A folder like the Hub's, but for the models' own code, which no conversion reads.
    stored = write_sparse_model(model, found["config"], shards=2)
    assert stored == 2 * (found["parameters"] - sum(found_beside(name).values()))
    recipe = read_recipe(RECIPES / f"{name}.toml")
    assert recipe["source"] == found["model"]
    told = run_json("plan", model, "--recipe", name, "--method", "periodic")
    shape = FAMILIES[found["config"]["model_type"]].dimensions(found["config"], name)
    kept = build_settings(recipe, (), {}, name).kept(shape)
    assert len(told["full_attention_layers"]) == kept
    sizes = f"{human_bytes(told['kv_bytes']['hybrid'])} instead of "
    assert expected_line(name).endswith(sizes + human_bytes(told["kv_bytes"]["full"]))
    native = "runs natively" in recipe_notes(RECIPES / f"{name}.toml").summary
    out = tmp_path / "out"
    layers_text = ",".join(map(str, told["full_attention_layers"]))
    options = ("--layers", layers_text, "--window", recipe["window"], "-q")
    assert run_cli("convert", model, out, *options) == 0
    written = json.loads((out / "config.json").read_text())
    assert written["model_type"].startswith("hybrid_") is (not native)
    plan = written["hybrid"].get("layer_types") or written["layer_types"]
    assert plan.count("full_attention") == kept


@pytest.mark.parametrize("name", MODELS)
def test_a_recipe_states_what_the_formula_gives(name: str) -> None:
    text = (RECIPES / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    assert [line for line in text if line.startswith("# expected:")] == [expected_line(name)]
    assert recipe_notes(RECIPES / f"{name}.toml").measured == "no"
