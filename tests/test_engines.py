"""The table of engines: whole, and what `--target` admits from it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from converter import engines
from converter.engines import TARGETS, check_target, verdicts
from converter.errors import PlanError
from converter.families import FAMILIES
from converter.form import Form

WORDS = {"honoured", "needs a flag", "wrong window", "silent full", "refused", "not yet"}
NATIVE = {
    family.native.model_type: Form(True, family.native.model_type, family.native.base_class, None)
    for family in FAMILIES.values()
    if family.native is not None
}
CUSTOM = Form(False, "hybrid_qwen3", "Qwen3", "no native code computes this mask")
CUSTOM_WITH_MLX = replace(CUSTOM, mlx_module="qwen3")
FORMS = [*NATIVE.values(), CUSTOM, CUSTOM_WITH_MLX]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.model_type)
def test_every_engine_has_a_word_for_every_form(form: Form) -> None:
    found = verdicts(form)
    assert len({verdict.engine for verdict in found}) == len(found)
    for verdict in found:
        assert verdict.word in WORDS
        assert verdict.word in (engines.__doc__ or "")
        assert verdict.note


def test_every_target_asks_for_one_engine() -> None:
    asked = [verdict.target for verdict in verdicts(CUSTOM) if verdict.target]
    assert sorted(asked) == sorted(set(TARGETS) - {"any"})


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.model_type)
@pytest.mark.parametrize("target", TARGETS)
def test_a_target_admits_what_its_engine_computes(target: str, form: Form) -> None:
    word = next((v.word for v in verdicts(form) if v.target == target), "honoured")
    if word in ("honoured", "needs a flag", "not yet"):
        check_target(target, form)
    else:
        with pytest.raises(PlanError, match=word) as caught:
            check_target(target, form)
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
        check_target(target, form)
    else:
        with pytest.raises(PlanError):
            check_target(target, form)
