"""From settings and scores to a mask and a plan."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converter import pipeline
from converter.calibration.run import RunContext
from converter.calibration.scores import ExampleScores, Scores, rank
from converter.common.errors import PlanError
from converter.common.progress import Bar
from converter.model.dimensions import ModelDimensions
from converter.model.mask import FULL, Mask
from converter.model.source import Source, open_source
from converter.plan.plan import Plan
from converter.settings import DEFAULT_BUDGET, Settings
from tests.tiny import tiny_model

SHAPE = ModelDimensions(4, 16, 4, 2, 8, 24, 32, 512, 2)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(str(tiny_model(tmp_path_factory.mktemp("decide") / "m")))


def decided(source: Source, settings: Settings, scores: Scores | None) -> Plan:
    """Nothing is measured for these plans, so nothing is shown or kept."""
    context = RunContext(Path("unused"), False, not_shown, print, print)
    return pipeline.plan(source, settings, context, scores)


def not_shown(title: str, amount: float) -> AbstractContextManager[Bar]:
    raise AssertionError(f"{title}: nothing should be measured ({amount})")


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
    assert Settings().mask(replace(SHAPE, context_tokens=context)) == Mask(window)


@given(st.integers(2, 10**6))
def test_the_default_mask_fits_every_context(context: int) -> None:
    shape = replace(SHAPE, context_tokens=context)
    mask = Settings().mask(shape)
    assert 1 <= mask.window_tokens < context
    assert mask.window_tokens < Settings().prompt_tokens(shape) or context < 4
    assert Settings().prompt_tokens(shape) < context


def test_the_mask_is_what_the_settings_say() -> None:
    assert Settings(window=8, sinks=2, full_decode=True).mask(SHAPE) == Mask(8, 2, True)


def test_prompts_are_shorter_than_the_context() -> None:
    assert Settings().prompt_tokens(SHAPE) == 480
    assert Settings(length=511).prompt_tokens(SHAPE) == 511
    assert Settings().prompt_tokens(replace(SHAPE, context_tokens=131072)) == 16384


def test_the_budget_is_a_quarter_unless_one_is_given() -> None:
    assert str(Settings().parsed_budget()) == DEFAULT_BUDGET == "1/4"
    assert str(Settings(budget="0").parsed_budget()) == "0"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.floats(-4, 4), min_size=4, max_size=4), st.integers(0, 4))
def test_the_best_layers_within_the_budget_are_kept(
    source: Source, gains: list[float], count: int
) -> None:
    scores = scores_for(source, *gains)
    plan = decided(source, Settings(budget=str(count)), scores)
    kept = plan.full_attention_layers
    assert len(kept) == count
    means = [layer.mean for layer in scores.estimates]
    others = [means[i] for i in range(4) if i not in kept]
    assert not kept or not others or min(means[i] for i in kept) >= max(others)
    assert plan.ranking == scores.order
    assert (plan.layer_types == (FULL,) * 4) is (count == 4)


def test_a_plan_says_where_it_came_from(source: Source) -> None:
    scores = scores_for(source, 0.1, 0.9, 0.5, 0.2, mask=Mask(8, 2))
    plan = decided(source, Settings(budget="1/2"), scores)
    assert plan.full_attention_layers == (1, 2)
    assert (plan.method, plan.budget) == ("nll-restore", "1/2")
    assert plan.mask == Mask(8, 2)
    assert (plan.source, plan.revision) == ("m", None)
    assert plan.ranking == (1, 2, 3, 0)


def test_named_layers_are_kept_whatever_the_scores(source: Source) -> None:
    scores = scores_for(source, 4.0, 3.0, 2.0, 1.0)
    plan = decided(source, Settings(layers=(3,)), scores)
    assert plan.full_attention_layers == (3,)
    assert (plan.method, plan.budget) == ("hand", None)
    assert plan.mask == scores.mask
    # A mask that is asked for again is no other mask.
    assert decided(source, Settings(window=16), scores).mask == scores.mask
    assert decided(source, Settings(layers=()), None).full_attention_layers == ()


def test_a_periodic_plan_names_its_offset(source: Source) -> None:
    plan = decided(source, Settings(method="periodic", budget="2", offset=1), None)
    assert plan.full_attention_layers == (1, 3)
    assert (plan.method, plan.ranking) == ("periodic, offset 1", None)


def test_the_target_is_held_against_the_mask_of_the_scores(source: Source) -> None:
    scores = scores_for(source, 1.0, 1.0, 1.0, 1.0, mask=Mask(16, 4))
    assert decided(source, Settings(target="transformers"), scores).mask == Mask(16, 4)
    with pytest.raises(PlanError, match=r"llama\.cpp"):
        decided(source, Settings(target="llama.cpp"), scores)
