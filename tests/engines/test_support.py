"""The table of engines: whole, and what `--target` admits from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from converter.checkpoint.format import CheckpointFormat
from converter.common.errors import PlanError
from converter.engines import support as engines
from converter.engines.gguf.architecture import GgufForm, gguf_form
from converter.engines.support import TARGETS, check_target, check_target_of, verdicts, verdicts_on
from converter.model.families import FAMILIES
from converter.model.mask import Mask
from converter.model.source import open_source
from tests.tiny import tiny_model

WORDS = {"honoured", "needs a flag", "wrong window", "silent full", "refused"}
NATIVE = {
    family.native.model_type: CheckpointFormat(
        True, family.native.model_type, family.native.base_class, None
    )
    for family in FAMILIES.values()
    if family.native is not None
}
CUSTOM = CheckpointFormat(
    False,
    "hybrid_qwen3",
    "Qwen3",
    "no native code computes this mask",
)
CUSTOM_WITH_MLX = replace(CUSTOM, mlx_module="qwen3")
GGUF = GgufForm("step35")
NO_GGUF = GgufForm(None, "it has no such mask: refused", "measure again without --sinks")
FORMS = [*NATIVE.values(), CUSTOM, CUSTOM_WITH_MLX]


def gguf_of(form: CheckpointFormat) -> GgufForm:
    return GGUF if form.native else NO_GGUF


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.model_type)
def test_every_engine_has_a_word_for_every_form(form: CheckpointFormat) -> None:
    found = verdicts_on(form, gguf_of(form))
    assert len({verdict.engine for verdict in found}) == len(found)
    for verdict in found:
        assert verdict.word in WORDS
        assert verdict.word in (engines.__doc__ or "")
        assert verdict.note


def test_every_target_asks_for_one_engine() -> None:
    asked = [verdict.target for verdict in verdicts_on(CUSTOM, NO_GGUF) if verdict.target]
    assert sorted(asked) == sorted(set(TARGETS) - {"any"})


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.model_type)
@pytest.mark.parametrize("target", TARGETS)
def test_a_target_admits_what_its_engine_computes(target: str, form: CheckpointFormat) -> None:
    word = next(
        (v.word for v in verdicts_on(form, gguf_of(form)) if v.target == target), "honoured"
    )
    if word in ("honoured", "needs a flag"):
        check_target_of(target, form, gguf_of(form))
    else:
        with pytest.raises(PlanError, match=word) as caught:
            check_target_of(target, form, gguf_of(form))
        assert caught.value.details["where"] == "--target"
        assert ("--sinks" in caught.value.details["next step"]) is (not form.native)


@pytest.mark.parametrize(
    ("model_type", "target", "admitted"),
    [
        ("qwen3", "any", True),
        ("qwen3", "transformers", True),
        ("qwen3", "mlx", True),
        ("custom with mlx", "mlx", True),
        ("custom with mlx", "vllm", False),
        ("mistral", "mlx", True),
        ("mistral", "vllm", True),
        ("mistral", "llama.cpp", True),
        ("custom", "any", True),
        ("custom", "transformers", True),
        ("custom", "llama.cpp", False),
        ("custom", "vllm", False),
        ("custom", "mlx", False),
    ],
)
def test_known_answers(model_type: str, target: str, admitted: bool) -> None:
    form = {**NATIVE, "custom with mlx": CUSTOM_WITH_MLX}.get(model_type, CUSTOM)
    if admitted:
        check_target_of(target, form, gguf_of(form))
    else:
        with pytest.raises(PlanError):
            check_target_of(target, form, gguf_of(form))


@pytest.mark.parametrize(
    ("family", "mask", "changes", "arch"),
    [
        ("qwen3", Mask(16), {}, "step35"),
        ("qwen3", Mask(1), {}, "step35"),
        ("qwen2", Mask(16), {}, "step35"),
        ("qwen2", Mask(16), {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "granite_swa"),
        ("llama", Mask(16), {}, "granite_swa"),
        ("mistral", Mask(16), {"rope_scaling": {"type": "linear", "factor": 2}}, "granite_swa"),
        ("olmo2", Mask(16), {"head_dim": 4}, "olmo2"),
        ("olmo2", Mask(16), {"head_dim": 8}, None),
        ("qwen3", Mask(16, 2), {}, None),
        ("qwen3", Mask(16, 0, True), {}, None),
        ("qwen3", Mask(16), {"rope_scaling": {"type": "yarn", "factor": 4.0}}, None),
        ("qwen3", Mask(16), {"rope_scaling": {"type": "yarn", "factor": "four"}}, None),
        ("llama", Mask(16), {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, None),
        ("llama", Mask(16), {"rope_scaling": {"rope_type": ["llama3"]}}, None),
        ("llama", Mask(16), {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, None),
        ("llama", Mask(16), {"partial_rotary_factor": 0.5}, None),
        ("llama", Mask(16), {"rms_norm_eps": "small"}, None),
        ("phi3", Mask(16), {}, None),
        ("gemma", Mask(16), {}, None),
    ],
    ids=str,
)
def test_llama_cpp_by_family_and_mask(
    family: str, mask: Mask, changes: dict[str, Any], arch: str | None, tmp_path: Path
) -> None:
    """The verdict is the one that `hybridize export` acts by."""
    source = open_source(str(tiny_model(tmp_path / "m", model_type=family, **changes)))
    gguf = gguf_form(source, mask)
    verdict = next(v for v in verdicts(source, mask) if v.engine == "llama.cpp")
    assert gguf.arch == arch
    if arch is None:
        assert verdict.word == "refused" and verdict.note == gguf.why_not
        with pytest.raises(PlanError) as caught:
            check_target("llama.cpp", source, mask)
        assert caught.value.details["next step"]
    else:
        assert verdict.word == "honoured" and arch in verdict.note
        check_target("llama.cpp", source, mask)
