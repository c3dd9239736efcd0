"""What a plan looks like in config.json and in Python files."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from converter import __version__
from converter.checkpoint.format import (
    ATTENTION_FILE,
    CONFIGURATION_FILE,
    MASKS_FILE,
    MLX_FILE,
    MODELING_FILE,
    VLLM_FILE,
    format_of,
    render_code,
    render_config,
)
from converter.model.families import FAMILIES
from converter.model.mask import FULL, SLIDING, Mask
from converter.model.source import Source, open_source
from converter.plan.plan import Plan
from tests.conftest import MIXED_FAMILIES, MULTIMODAL_FAMILIES
from tests.tiny import tiny_model

KEEPING_TYPES = {*MIXED_FAMILIES, *MULTIMODAL_FAMILIES}
PLAIN, SINKS, DECODE = Mask(16), Mask(16, 4), Mask(16, 0, True)
MOE = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
every_form = pytest.mark.parametrize(
    ("family", "mask"), [(family, mask) for family in FAMILIES for mask in (PLAIN, SINKS, DECODE)]
)


def source_of(folder: Path, family: str, **changes: Any) -> Source:
    extra = {**MOE, "num_experts": 2} if FAMILIES[family].load_exactly else {}
    if family in KEEPING_TYPES:
        extra |= {"layer_types": [FULL] * 4}
    if family == "gemma4_text":
        extra |= {"hidden_size_per_layer_input": 0}
    return open_source(str(tiny_model(folder, model_type=family, **extra, **changes)))


def plan_for(source: Source, mask: Mask) -> Plan:
    kinds = (FULL, SLIDING, SLIDING, FULL)
    return Plan(kinds, mask, "nll-restore", "1/2", (3, 0, 1, 2), source.name, "abc")


@every_form
def test_a_config_says_the_plan(family: str, mask: Mask, tmp_path: Path) -> None:
    source = source_of(tmp_path / "m", family)
    config = render_config(source, plan_for(source, mask))
    if family in KEEPING_TYPES:
        # Their class reads more than the mask from these.
        language = source.family.language(config)
        assert language["layer_types"] == [FULL] * 4
        assert language == source.family.language(source.config) | {
            key: language[key] for key in config.keys() & language.keys()
        }
        assert config["hybrid"]["layer_types"] == [FULL, SLIDING, SLIDING, FULL]
    else:
        assert config["layer_types"] == [FULL, SLIDING, SLIDING, FULL]
        assert config["sliding_window"] == 16
    said = {
        "format_version": 1,
        "mask": mask.to_json(),
        "method": "nll-restore",
        "budget": "1/2",
        "ranking": [3, 0, 1, 2],
        "source": "m",
        "source_revision": "abc",
        "tool_version": __version__,
    }
    assert config["hybrid"] == config["hybrid"] | said
    assert json.loads(json.dumps(config)) == config


@every_form
def test_config_and_code_agree_on_the_form(family: str, mask: Mask, tmp_path: Path) -> None:
    source = source_of(tmp_path / "m", family)
    form, config = format_of(source, mask), render_config(source, plan_for(source, mask))
    code = render_code(form)
    for_mlx = {MLX_FILE} & set(code)
    assert config.get("model_file") == next(iter(for_mlx), None)
    assert bool(for_mlx) is (form.mlx_module is not None)
    assert config["model_type"] == form.model_type
    # What a plain window does not need does not ship with it.
    more = set() if mask.is_plain_window else {MASKS_FILE}
    module = next(iter(more), MODELING_FILE).removesuffix(".py")
    more.add(ATTENTION_FILE)
    assert config["auto_map"]["AutoModelForCausalLM"] == f"{module}.HybridForCausalLM"
    if form.native:
        assert form.model_type in FAMILIES
        assert set(code) == {MODELING_FILE, ATTENTION_FILE} | for_mlx
        assert config["auto_map"].keys() == {"AutoModelForCausalLM"}
        assert config["architectures"] != ["HybridForCausalLM"]
    else:
        # A name that no engine knows: loading it without our code fails loudly.
        assert form.model_type == f"hybrid_{family}"
        assert form.why_not_native
        for_vllm = set() if FAMILIES[family].not_in_vllm else {VLLM_FILE}
        assert set(code) == {MODELING_FILE, CONFIGURATION_FILE} | for_vllm | more | for_mlx
        assert config["auto_map"]["AutoConfig"] == "configuration_hybrid.HybridConfig"
        # vLLM takes no other entry.
        named = "vllm_hybrid.HybridModel" if for_vllm else None
        assert config["auto_map"].get("AutoModel") == named
        assert config["architectures"] == ["HybridForCausalLM"]
        assert not for_vllm or f"import {form.base_class}Model as" in code[VLLM_FILE]
        assert f'model_type = "{form.model_type}"' in code[CONFIGURATION_FILE]
        assert "from .configuration_hybrid import HybridConfig" in code[MODELING_FILE]


def imports_of(code: str) -> set[str]:
    """Modules that a file imports, and the names it takes from transformers."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + str(node.module or ""))
            found |= {name.name for name in node.names if node.module == "transformers"}
    return found


@every_form
def test_code_builds_on_the_class_of_the_form_and_on_no_other(
    family: str, mask: Mask, tmp_path: Path
) -> None:
    form = format_of(source_of(tmp_path / "m", family), mask)
    imports = {name for code in render_code(form).values() for name in imports_of(code)}
    assert form.model_class in imports
    assert form.config_class in imports
    if form.base_class != "Qwen3":
        assert not {"Qwen3ForCausalLM", "Qwen3Config"} & imports
    assert not any(name.split(".")[0] in ("converter", "hybridize") for name in imports)


@pytest.mark.parametrize(
    ("family", "mask", "model_type"),
    [
        ("qwen3", PLAIN, "qwen3"),
        ("qwen2", PLAIN, "qwen2"),
        ("llama", PLAIN, "mistral"),
        ("mistral", PLAIN, "mistral"),
        # Never its own type beside layer_types: its masks would stay full while its cache slides.
        ("llama", SINKS, "hybrid_llama"),
        ("llama", DECODE, "hybrid_llama"),
        ("qwen3", Mask(1), "hybrid_qwen3"),
    ],
)
def test_the_form_is_native_only_where_native_code_computes_the_plan(
    family: str, mask: Mask, model_type: str, tmp_path: Path
) -> None:
    source = source_of(tmp_path / "m", family)
    form = format_of(source, mask)
    assert form.model_type == model_type
    assert render_config(source, plan_for(source, mask))["model_type"] == model_type
    assert form.native == (form.why_not_native is None)


def test_what_misleads_in_a_checkpoint_is_dropped_and_the_rest_is_kept(tmp_path: Path) -> None:
    source = source_of(
        tmp_path / "m",
        "qwen3",
        auto_map={"AutoModelForCausalLM": "evil.Model"},
        _name_or_path="elsewhere",
        configuration_files=["config.4.0.0.json"],
        # As older versions of transformers spell them; other engines need them so.
        rope_theta=1e6,
        dtype=None,
        torch_dtype="bfloat16",
        unheard_of={"kept": [1, 2.5, None, "ü"]},
    )
    before = json.dumps(source.config)
    config = render_config(source, plan_for(source, PLAIN))
    assert "evil" not in json.dumps(config)
    assert not {"_name_or_path", "configuration_files"} & config.keys()
    kept = ("rope_theta", "torch_dtype", "unheard_of")
    assert {key: config[key] for key in kept} == {key: source.config[key] for key in kept}
    assert not {"rope_parameters", "dtype"} & config.keys()
    assert json.dumps(source.config) == before


@pytest.mark.parametrize(
    ("written", "named"),
    [(None, "5.0.0"), ("4.51.3", "5.0.0"), ("5.23.0", "5.23.0"), ("10.1", "10.1"), ("x", "5.0.0")],
)
def test_an_old_version_is_not_named(written: str | None, named: str, tmp_path: Path) -> None:
    source = source_of(tmp_path / "m", "mistral", transformers_version=written)
    assert render_config(source, plan_for(source, PLAIN))["transformers_version"] == named
