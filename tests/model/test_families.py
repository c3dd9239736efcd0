"""Families against the models that transformers makes, and against what it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from converter.checkpoint.format import render_config
from converter.common.errors import FamilyError, SourceError
from converter.model.dimensions import read_shape
from converter.model.families import FAMILIES, REFUSED, family_of
from converter.model.families.base import already_slides, rope_theta_and_scaling
from converter.model.families.llama import LLAMA, MISTRAL
from converter.model.families.qwen import QWEN3_MOE
from converter.model.mask import FULL, SLIDING, Mask
from converter.model.source import open_source
from converter.model.tensors import read_layer, read_tensors
from converter.plan.plan import Plan
from tests.conftest import EVERY_FAMILY, make_model, run_cli
from tests.tiny import config_of, tiny_model


def test_the_tests_cover_every_family() -> None:
    assert set(EVERY_FAMILY) == set(FAMILIES)
    assert [family.model_type for family in FAMILIES.values()] == list(FAMILIES)


LAYOUTS = [
    *((family, {}) for family in EVERY_FAMILY),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True, "tie_word_embeddings": False}),
    ("qwen3", {"attention_bias": True, "tie_word_embeddings": False}),
    ("llama", {"head_dim": 8, "num_key_value_heads": 1}),
]


@pytest.mark.parametrize(("family", "changes"), LAYOUTS, ids=str)
def test_a_family_expects_exactly_the_tensors_that_transformers_saves(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    source = open_source(str(make_model(tmp_path / family, family, **changes)))
    expected = source.family.expected_tensors(source.config, source.shape)
    held = source.weights.shapes
    if source.family.inside:
        head = (source.family.prefix, "lm_head.")
        held = {name: size for name, size in held.items() if name.startswith(head)}
    assert expected == held


@pytest.mark.parametrize("model_type", ["mamba", "", None, 3, ["llama"], "hybrid_qwen3"])
def test_another_architecture_is_refused_with_the_list_of_known_ones(model_type: object) -> None:
    with pytest.raises(FamilyError, match="not supported") as caught:
        family_of(model_type, "config.json")
    assert all(name in caught.value.details["expected"] for name in FAMILIES)
    assert caught.value.details["got"] == repr(model_type)


@pytest.mark.parametrize(
    ("config", "slides"),
    [
        ({}, False),
        ({"sliding_window": None}, False),
        ({"sliding_window": 511}, True),
        ({"sliding_window": 512}, False),
        ({"sliding_window": 128, "use_sliding_window": False}, False),
        ({"sliding_window": 128, "use_sliding_window": True}, True),
        ({"layer_types": ["full_attention"] * 4}, False),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, True),
        ({"layer_types": None}, False),
    ],
    ids=str,
)
def test_a_source_that_slides_already_is_told_from_one_that_does_not(
    config: dict[str, Any], slides: bool
) -> None:
    assert (already_slides(config_of(**config)) is not None) is slides


def test_a_mixture_whose_layers_differ_is_refused() -> None:
    mixed = config_of(num_experts=4, moe_intermediate_size=8)
    assert QWEN3_MOE.refuse(mixed) is None
    for changes in ({"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}, {"num_experts": None}):
        assert QWEN3_MOE.refuse(mixed | changes) is not None


LINEAR, OLDER = {"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("config", "theta", "scaling"),
    [
        ({}, 10000.0, None),
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1e6, None),
        ({"rope_parameters": LINEAR | {"rope_theta": 3e4}}, 3e4, LINEAR),
        ({"rope_theta": 5e5, "rope_scaling": OLDER}, 5e5, OLDER),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
    ],
    ids=str,
)
def test_rotary_settings_are_spelled_for_every_engine(
    config: dict[str, Any], theta: float, scaling: dict[str, Any] | None
) -> None:
    before = repr(config)
    assert rope_theta_and_scaling(config) == {"rope_theta": theta, "rope_scaling": scaling}
    assert repr(config) == before


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_only_a_plain_window_is_native(family: Any) -> None:
    assert (family.why_not_native(config_of(), Mask(8)) is None) is (family.native is not None)
    for mask in (Mask(8, 1), Mask(8, 0, True), Mask(1)):
        assert family.why_not_native(config_of(), mask)


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias"])
def test_a_llama_with_biases_has_no_mistral_form(key: str) -> None:
    assert LLAMA.why_not_native(config_of(**{key: True}), Mask(8))
    assert LLAMA.why_not_native(config_of(**{key: False}), Mask(8)) is None


def test_the_mistral_form_spells_out_what_would_default_differently() -> None:
    config = config_of(model_type="llama", head_dim=None, num_key_value_heads=None, mlp_bias=False)
    del config["rms_norm_eps"]
    assert MISTRAL.native is not None
    edited = MISTRAL.native.edit(config, read_shape(config, "config.json"))
    wanted = {"head_dim": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-6}
    wanted |= {"tie_word_embeddings": False, "rope_theta": 10000.0}
    assert {key: edited[key] for key in wanted} == wanted
    assert not {"mlp_bias", "attention_bias", "rope_parameters"} & set(edited)


def test_a_qwen_keeps_its_window_in_every_engine(tmp_path: Path) -> None:
    """Without use_sliding_window it is dropped; max_window_layers would silence it in vLLM."""
    folder = tiny_model(tmp_path / "m", use_sliding_window=False, max_window_layers=4)
    plan = Plan((FULL, SLIDING) * 2, Mask(8), "layers", None, None, "m", None)
    edited = render_config(open_source(str(folder)), plan)
    assert (edited["use_sliding_window"], edited["max_window_layers"]) == (True, 0)


@pytest.mark.parametrize(
    ("scaling", "added"), [(8.0, {"logit_scale": 0.125}), (None, {}), ("x", {}), (0, {})]
)
def test_a_granite_keeps_the_scale_of_its_logits_in_vllm(
    scaling: object, added: dict[str, float]
) -> None:
    """It reads no logits_scaling there: without a logit_scale, logits would stay unscaled."""
    assert FAMILIES["granite"].added_keys({"logits_scaling": scaling}) == added


def test_a_mixture_that_does_not_say_its_experts_is_refused() -> None:
    glm = config_of(n_routed_experts=4, moe_intermediate_size=8)
    assert FAMILIES["glm4_moe"].refuse(glm) is None
    for changes in ({"n_routed_experts": 0}, {"moe_intermediate_size": "8"}):
        assert "does not say" in (FAMILIES["glm4_moe"].refuse(glm | changes) or "")
    for key in ("first_k_dense_replace", "n_shared_experts"):
        assert key in (FAMILIES["glm4_moe"].refuse(glm | {key: None}) or "")
    assert FAMILIES["minimax_m2"].refuse(config_of(num_local_experts=4)) is None
    assert FAMILIES["minimax_m2"].refuse(config_of()) is not None


def test_a_router_s_bias_is_read_in_full_precision(tmp_path: Path) -> None:
    """It decides which experts work; transformers keeps it in float32, whatever the rest is in."""
    import torch

    source = open_source(str(make_model(tmp_path / "m", "glm4_moe")))
    found = read_tensors(source, source.weights.tensors, "cpu", torch.bfloat16)
    wide = {name for name, tensor in found.items() if tensor.dtype == torch.float32}
    assert wide == {f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2, 3)}


def test_experts_are_taken_packed_or_one_by_one(tmp_path: Path) -> None:
    """Published Qwen3.5 holds each layer's experts in one tensor; transformers saves them apart."""
    import torch
    from transformers import AutoModelForCausalLM

    apart, packed = make_model(tmp_path / "m", "qwen3_5_moe_text"), tmp_path / "packed"
    model = AutoModelForCausalLM.from_pretrained(apart)
    model.save_pretrained(packed, save_original_format=False)
    sources = [open_source(str(folder)) for folder in (apart, packed)]
    assert [source.weights.packed_experts for source in sources] == [False, True]
    layers = [read_layer(source, 1, "cpu", torch.float64) for source in sources]
    assert layers[0].keys() == layers[1].keys()
    assert all(torch.equal(layers[0][name], layers[1][name]) for name in layers[0])
    options = ("--layers", "1", "--window", "16", "--verify", "-q")
    assert run_cli("convert", packed, tmp_path / "out", *options) == 0
    (packed / "config.json").write_text(
        (packed / "config.json").read_text().replace('"num_experts": 4', '"num_experts": 5')
    )
    with pytest.raises(SourceError, match=r"mlp\.gate"):
        open_source(str(packed))


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_people_will_try_is_refused_with_the_reason(model_type: str, tmp_path: Path) -> None:
    """The configuration is transformers' own; a reason stands for a type that exists."""
    from transformers import AutoConfig

    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(FamilyError) as caught:
        open_source(str(tmp_path))
    assert REFUSED[model_type] in str(caught.value)
    assert caught.value.details["got"] == repr(model_type)
