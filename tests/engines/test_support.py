"""The table of engines: whole, and what `--target` admits from it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from converter.checkpoint.format import format_of, render_code
from converter.common.errors import PlanError, SourceError
from converter.engines import support
from converter.engines.support import ENGINES, TARGETS, check_target, verdicts
from converter.model.families import FAMILIES
from converter.model.mask import Mask
from converter.model.source import Source, open_source
from tests.tiny import tiny_model

WORDS = {"honoured", "needs a flag", "wrong window", "silent full", "refused"}
PLAIN, SINKS, DECODE = Mask(16), Mask(16, 2), Mask(16, 0, True)
Sources = Callable[[str], Source]
# What mixtures need beside the sizes of every tiny model.
EXPERTS = {"num_experts": 2, "moe_intermediate_size": 8, "norm_topk_prob": True}
EXPERTS |= {"shared_expert_intermediate_size": 8, "hidden_size_per_layer_input": 0}
# transformers has Gemma 4's last layer attend fully, whatever its configuration says.
OWN = {"gemma4_text": {"layer_types": [*["sliding_attention"] * 3, "full_attention"]}}
FORMS = [(family, mask) for family in FAMILIES for mask in (PLAIN, SINKS, DECODE)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    root = tmp_path_factory.mktemp("support")
    return cache(
        lambda family: open_source(
            str(tiny_model(root / family, model_type=family, **EXPERTS, **OWN.get(family, {})))
        )
    )


@pytest.mark.parametrize(("family", "mask"), FORMS, ids=str)
def test_every_engine_has_a_word_and_its_target_goes_by_it(
    family: str, mask: Mask, source: Sources
) -> None:
    opened = source(family)
    found = verdicts(opened, mask)
    assert tuple(verdict.engine for verdict in found) == ENGINES
    assert sorted(v.target for v in found if v.target) == sorted(set(TARGETS) - {"any"})
    check_target("any", opened, mask)
    since = format_of(opened, mask).since
    assert [v.engine for v in found if since in v.note] == ["transformers"]
    for verdict in found:
        assert verdict.note and verdict.word in WORDS
        assert verdict.word in (support.__doc__ or "")
        if verdict.target is None:
            continue
        if verdict.word in ("honoured", "needs a flag"):
            check_target(verdict.target, opened, mask)
            continue
        with pytest.raises(PlanError) as caught:
            check_target(verdict.target, opened, mask)
        assert caught.value.details["where"] == "--target"
        if verdict.target != "llama.cpp":
            assert verdict.word in str(caught.value)
            assert ("--sinks" in caught.value.details["next step"]) is not mask.is_bare


@pytest.mark.parametrize(
    ("family", "mask", "admitted"),
    [
        *((family, PLAIN, TARGETS[1:]) for family in ("qwen3", "mistral")),
        # With code for mlx-lm, and without.
        ("qwen3", SINKS, ("transformers", "mlx")),
        ("qwen3", DECODE, ("transformers",)),
        # vLLM runs custom forms whose mask is a bare window, of one token too.
        *((family, PLAIN, ("transformers", "vllm")) for family in ("phi3", "seed_oss", "glm4_moe")),
        ("phi3", SINKS, ("transformers",)),
        ("qwen3", Mask(1), ("transformers", "vllm", "mlx", "llama.cpp")),
    ],
    ids=str,
)
def test_known_answers(family: str, mask: Mask, admitted: tuple[str, ...], source: Sources) -> None:
    for target in set(TARGETS) - {"any"}:
        with nullcontext() if target in admitted else pytest.raises(PlanError):
            check_target(target, source(family), mask)


YARN = {"rope_scaling": {"type": "yarn", "factor": 4.0}}


@pytest.mark.parametrize(
    ("family", "mask", "changes", "arch"),
    [
        ("qwen3", PLAIN, {}, "step35"),
        ("qwen3", Mask(1), {}, "step35"),
        ("qwen2", PLAIN, {}, "step35"),
        ("qwen2", PLAIN, YARN, "granite_swa"),
        ("llama", PLAIN, {}, "granite_swa"),
        ("mistral", PLAIN, {"rope_scaling": {"type": "linear", "factor": 2}}, "granite_swa"),
        ("olmo2", PLAIN, {"head_dim": 4}, "olmo2"),
        ("olmo2", PLAIN, {"head_dim": 8}, None),
        ("qwen3", SINKS, {}, None),
        ("qwen3", DECODE, {}, None),
        ("qwen3", PLAIN, YARN, None),
        ("qwen3", PLAIN, {"rope_scaling": {"type": "yarn", "factor": "four"}}, None),
        ("llama", PLAIN, {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, None),
        ("llama", PLAIN, {"rope_scaling": {"rope_type": ["llama3"]}}, None),
        ("llama", PLAIN, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, None),
        ("llama", PLAIN, {"partial_rotary_factor": 0.5}, None),
        ("llama", PLAIN, {"rms_norm_eps": "small"}, None),
        ("phi3", PLAIN, {}, None),
        ("gemma", PLAIN, {}, None),
    ],
    ids=str,
)
def test_llama_cpp_by_family_and_mask(
    family: str, mask: Mask, changes: dict[str, Any], arch: str | None, tmp_path: Path
) -> None:
    """The verdict is the one that `hybridize export` acts by."""
    opened = open_source(str(tiny_model(tmp_path / "m", model_type=family, **changes)))
    verdict = next(v for v in verdicts(opened, mask) if v.engine == "llama.cpp")
    if arch is not None:
        assert verdict.word == "honoured" and arch in verdict.note
        check_target("llama.cpp", opened, mask)
        return
    assert verdict.word == "refused"
    with pytest.raises(PlanError) as caught:
        check_target("llama.cpp", opened, mask)
    assert caught.value.details["got"] == verdict.note
    assert caught.value.details["next step"]


def test_a_value_of_another_type_is_a_refusal(source: Sources) -> None:
    granite = source("granite")
    config = {**granite.config, "residual_multiplier": [1]}
    with pytest.raises(SourceError, match="configuration cannot be used"):
        verdicts(replace(granite, config=config), PLAIN)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("minimax_m2", "does not route these experts"),
        ("qwen3_5_text", "layers with attention only"),
        ("gemma3_text", "which layers slide, and this family more"),
    ],
)
def test_a_family_that_vllm_does_not_run_is_refused_there_with_the_reason(
    family: str, why: str, source: Sources
) -> None:
    words = {v.engine: v.word for v in verdicts(source(family), PLAIN)}
    assert words["transformers"] == "needs a flag"
    assert {words[name] for name in ("vLLM", "SGLang", "mlx-lm", "llama.cpp")} == {"refused"}
    assert "vllm_hybrid.py" not in render_code(format_of(source(family), PLAIN))
    with pytest.raises(PlanError, match="vLLM would not honour") as caught:
        check_target("vllm", source(family), PLAIN)
    assert why in caught.value.details["got"]


@pytest.mark.parametrize("mask", [PLAIN, SINKS], ids=str)
@pytest.mark.parametrize("family", ["qwen3", "llama", "phi3"])
def test_plans_of_kv_heads_run_in_transformers_alone(
    family: str, mask: Mask, source: Sources
) -> None:
    opened = source(family)
    words = {v.target: v.word for v in verdicts(opened, mask, by_heads=True) if v.target}
    assert words.pop("transformers") == "needs a flag"
    assert set(words.values()) == {"refused"}
    form = format_of(opened, mask, by_heads=True)
    assert not form.native
    assert form.mlx_module is None
    assert not form.vllm
    check_target("transformers", opened, mask, by_heads=True)
    for target in words:
        with pytest.raises(PlanError) as caught:
            check_target(target, opened, mask, by_heads=True)
        assert "KV heads of a layer" in str(caught.value.details["got"])
        assert "--granularity" in caught.value.details["next step"]
