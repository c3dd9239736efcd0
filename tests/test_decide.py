"""From settings and scores to a mask and a plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converter.calibration.scores import ExampleScores, Scores, rank
from converter.common.errors import PlanError, ScoresError, UsageError
from converter.decide import (
    DEFAULT_BUDGET,
    check_method,
    check_plan_settings,
    choose_length,
    choose_mask,
    chosen_budget,
    decide,
    needs_scores,
)
from converter.model.dimensions import ModelDimensions
from converter.model.mask import FULL, Mask
from converter.model.source import Source, open_source
from converter.settings import Settings
from tests.tiny import tiny_model

SHAPE = ModelDimensions(4, 16, 4, 2, 8, 24, 32, 512, 2)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(str(tiny_model(tmp_path_factory.mktemp("decide") / "m")))


def scores_for(source: Source, *gains: float, mask: Mask | None = None) -> Scores:
    """Scores in which restoring layer i gains gains[i]."""
    example = ExampleScores("pair", 100, 4, 1.0, 5.0, gains)
    fingerprint = {"source": source.fingerprint}
    order = rank(gains)
    return Scores("nll-restore", mask or Mask(16), (example,), 24, fingerprint, order)


@pytest.mark.parametrize(
    ("context", "window"), [(512, 32), (32768, 2048), (131072, 2048), (20, 1), (40960, 2048)]
)
def test_the_window_is_a_sixteenth_of_the_context_up_to_2048(context: int, window: int) -> None:
    assert choose_mask(Settings(), replace(SHAPE, context_tokens=context)) == Mask(window)


@given(st.integers(2, 10**6))
def test_the_default_mask_fits_every_context(context: int) -> None:
    shape = replace(SHAPE, context_tokens=context)
    mask = choose_mask(Settings(), shape)
    assert 1 <= mask.window_tokens < context
    assert mask.window_tokens < choose_length(Settings(), shape) or context < 4
    assert choose_length(Settings(), shape) < context


def test_the_mask_is_what_the_settings_say() -> None:
    assert choose_mask(Settings(window=8, sinks=2, full_decode=True), SHAPE) == Mask(8, 2, True)


@pytest.mark.parametrize("wrong", [{"window": 0}, {"window": 512}, {"sinks": -1}, {"sinks": 480}])
def test_a_mask_that_does_not_fit_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        choose_mask(Settings(**wrong), SHAPE)


def test_prompts_are_shorter_than_the_context() -> None:
    assert choose_length(Settings(), SHAPE) == 480
    assert choose_length(Settings(length=511), SHAPE) == 511
    assert choose_length(Settings(), replace(SHAPE, context_tokens=131072)) == 16384
    with pytest.raises(UsageError, match="longer than the model's context"):
        choose_length(Settings(length=512), SHAPE)


@pytest.mark.parametrize(
    ("chosen", "needs"),
    [
        ({}, True),
        ({"method": "periodic"}, False),
        ({"layers": (1,)}, False),
        ({"layers": ()}, False),
    ],
)
def test_scores_are_needed_unless_the_layers_are_given(chosen: dict[str, Any], needs: bool) -> None:
    assert needs_scores(Settings(**chosen)) is needs


def test_the_budget_is_a_quarter_unless_one_is_given() -> None:
    assert str(chosen_budget(Settings())) == DEFAULT_BUDGET == "1/4"
    assert str(chosen_budget(Settings(budget="0"))) == "0"
    with pytest.raises(PlanError):
        chosen_budget(Settings(budget=""))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.floats(-4, 4), min_size=4, max_size=4), st.integers(0, 4))
def test_the_best_layers_within_the_budget_are_kept(
    source: Source, gains: list[float], count: int
) -> None:
    scores = scores_for(source, *gains)
    plan = decide(source, Settings(budget=str(count)), scores)
    kept = plan.full_attention_layers
    assert len(kept) == count
    means = [layer.mean for layer in scores.layers]
    others = [means[i] for i in range(4) if i not in kept]
    assert not kept or not others or min(means[i] for i in kept) >= max(others)
    assert plan.ranking == scores.order


def test_a_plan_says_where_it_came_from(source: Source) -> None:
    scores = scores_for(source, 0.1, 0.9, 0.5, 0.2, mask=Mask(8, 2))
    plan = decide(source, Settings(budget="1/2"), scores)
    assert plan.full_attention_layers == (1, 2)
    assert (plan.method, plan.budget) == ("nll-restore", "1/2")
    assert plan.mask == Mask(8, 2)
    assert (plan.source, plan.revision) == ("m", None)
    assert plan.ranking == (1, 2, 3, 0)


def test_named_layers_are_kept_whatever_the_scores(source: Source) -> None:
    scores = scores_for(source, 4.0, 3.0, 2.0, 1.0)
    plan = decide(source, Settings(layers=(3,)), scores)
    assert plan.full_attention_layers == (3,)
    assert (plan.method, plan.budget) == ("layers", None)
    assert plan.mask == scores.mask
    assert decide(source, Settings(layers=()), None).full_attention_layers == ()


def test_a_periodic_plan_names_its_offset(source: Source) -> None:
    plan = decide(source, Settings(method="periodic", budget="2", offset=1), None)
    assert plan.full_attention_layers == (1, 3)
    assert (plan.method, plan.ranking) == ("periodic, offset 1", None)


def test_all_layers_may_keep_full_attention(source: Source) -> None:
    plan = decide(source, Settings(budget="1/1"), scores_for(source, 1.0, 2.0, 3.0, 4.0))
    assert plan.layer_types == (FULL,) * 4


def test_a_plan_by_score_needs_scores(source: Source) -> None:
    with pytest.raises(PlanError, match="needs scores"):
        decide(source, Settings(), None)


def test_scores_of_another_model_are_refused(source: Source, tmp_path: Path) -> None:
    other = open_source(str(tiny_model(tmp_path / "other", rms_norm_eps=1e-5)))
    with pytest.raises(ScoresError, match="another model"):
        decide(source, Settings(), scores_for(other, 1.0, 1.0, 1.0, 1.0))


def test_scores_of_another_depth_are_refused(source: Source) -> None:
    with pytest.raises(ScoresError, match="another depth"):
        decide(source, Settings(), scores_for(source, 1.0, 1.0))


@pytest.mark.parametrize(
    ("asked", "option"),
    [
        ({"window": 8}, "--window"),
        ({"sinks": 1}, "--sinks"),
        ({"full_decode": True}, "--full-decode"),
    ],
)
def test_scores_under_another_mask_are_refused(
    asked: dict[str, Any], option: str, source: Source
) -> None:
    scores = scores_for(source, 1.0, 1.0, 1.0, 1.0)
    with pytest.raises(ScoresError, match="another mask") as caught:
        decide(source, Settings(**asked), scores)
    assert caught.value.details["where"] == option
    assert decide(source, Settings(window=16), scores).mask == Mask(16)


def test_scores_by_another_method_are_refused(source: Source) -> None:
    scores = scores_for(source, 1.0, 1.0, 1.0, 1.0)
    for method in (None, "periodic", "nll-restore"):
        check_method(scores, method)
    with pytest.raises(ScoresError, match="another method"):
        check_method(scores, "nll-remove")


@pytest.mark.parametrize(
    "wrong",
    [
        {"budget": "5"},
        {"budget": "x"},
        {"layers": (4,)},
        {"layers": (0, 0)},
        {"method": "periodic", "offset": 4},
        {"window": 512},
        {"target": "mlx", "full_decode": True},
        {"target": "llama.cpp", "sinks": 2},
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_before_anything_is_measured(
    wrong: dict[str, Any], source: Source
) -> None:
    check_plan_settings(source, Settings())
    with pytest.raises(PlanError):
        check_plan_settings(source, Settings(**wrong))


def test_the_target_is_held_against_the_mask_of_the_scores(source: Source) -> None:
    scores = scores_for(source, 1.0, 1.0, 1.0, 1.0, mask=Mask(16, 4))
    assert decide(source, Settings(target="transformers"), scores).mask == Mask(16, 4)
    with pytest.raises(PlanError, match=r"llama\.cpp"):
        decide(source, Settings(target="llama.cpp"), scores)
