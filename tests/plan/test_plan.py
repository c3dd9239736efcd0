"""Plans: layer kinds, cost, and files that contradict themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.common.errors import PlanError
from converter.model.dimensions import ModelDimensions
from converter.model.mask import FULL, SLIDING, Mask
from converter.plan.plan import Plan, kv_bytes, layer_types_of, load_plan, plan_from_json

SHAPE = ModelDimensions(4, 64, 4, 2, 16, 96, 320, 512, 2)


def plan_of(kinds: tuple[str, ...], mask: Mask | None = None) -> Plan:
    return Plan(kinds, mask or Mask(16), "layers", None, None, "model", None)


@st.composite
def plans(draw: Callable[..., Any]) -> Plan:
    kinds = tuple(draw(st.lists(st.sampled_from([FULL, SLIDING]), min_size=1, max_size=40)))
    layers = st.lists(st.integers(0, len(kinds) - 1), unique=True).map(tuple)
    return Plan(
        layer_types=kinds,
        mask=Mask(draw(st.integers(1, 9999)), draw(st.integers(0, 99)), draw(st.booleans())),
        method=draw(st.text()),
        budget=draw(st.none() | st.text()),
        ranking=draw(st.none() | st.permutations(range(len(kinds))).map(tuple)),
        source=draw(st.text()),
        revision=draw(st.none() | st.text()),
        profiles=draw(st.dictionaries(st.text(), layers, max_size=3)),
    )


@given(plans())
def test_a_plan_survives_json(plan: Plan) -> None:
    assert plan_from_json(json.loads(json.dumps(plan.to_json())), "here") == plan


def test_a_plan_file_with_added_keys_is_read(tmp_path: Path) -> None:
    plan = plan_of((FULL, SLIDING))
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.to_json() | {"kv_bytes": {"full": 1}}))
    assert load_plan(path) == plan


@given(plans())
def test_layers_and_kinds_say_the_same(plan: Plan) -> None:
    assert layer_types_of(plan.full_attention_layers, len(plan.layer_types)) == plan.layer_types
    assert plan.strip.replace(" ", "") == "".join(
        "█" if i in plan.full_attention_layers else "·" for i in range(len(plan.layer_types))
    )


def test_the_strip_groups_layers_by_four() -> None:
    assert plan_of(layer_types_of([0, 5, 8], 9)).strip == "█··· ·█·· █"


def test_layers_may_be_named_in_any_order() -> None:
    assert layer_types_of([2, 0], 3) == (FULL, SLIDING, FULL)
    assert layer_types_of([], 2) == (SLIDING, SLIDING)


@pytest.mark.parametrize(
    ("layers", "problem"),
    [([3], "no such layer"), ([-1], "no such layer"), ([1, 1], "named twice")],
)
def test_layers_that_the_model_does_not_have_are_refused(layers: list[int], problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        layer_types_of(layers, 3)


@pytest.mark.parametrize(
    ("mask", "context", "hybrid"),
    [
        # Keys and values of 2 heads x 16 x 2 bytes: 128 bytes for a token in a layer.
        (Mask(100), 512, 128 * (512 + 100 + 100 + 512)),
        (Mask(100, 4), 512, 128 * (512 + 104 + 104 + 512)),
        (Mask(100), 50, 128 * (50 + 50 + 50 + 50)),
        (Mask(100, 4), 102, 128 * (102 * 4)),
        (Mask(100, 0, True), 512, 128 * (512 * 4)),
        (Mask(1), 1000, 128 * (1000 + 1 + 1 + 1000)),
    ],
    ids=str,
)
def test_kv_bytes_are_those_counted_by_hand(mask: Mask, context: int, hybrid: int) -> None:
    plan = plan_of((FULL, SLIDING, SLIDING, FULL), mask)
    assert kv_bytes(plan, SHAPE, context) == {
        "full": 128 * context * 4,
        "hybrid": hybrid,
        "context_tokens": context,
    }


@given(plans(), st.integers(1, 10**5))
def test_a_plan_never_costs_more_than_full_attention(plan: Plan, context: int) -> None:
    shape = ModelDimensions(len(plan.layer_types), 64, 4, 2, 16, 96, 320, 512, 2)
    cost = kv_bytes(plan, shape, context)
    assert 0 < cost["hybrid"] <= cost["full"]
    if SLIDING not in plan.layer_types:
        assert cost["hybrid"] == cost["full"]


GOOD = plan_of((FULL, SLIDING)).to_json()


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": 2},
        {"format_version": "1"},
        {"layer_types": [SLIDING, SLIDING]},
        {"layer_types": [FULL, "other"]},
        {"layer_types": [FULL, {}]},
        {"layer_types": {FULL: SLIDING}},
        {"full_attention_layers": [1]},
        {"full_attention_layers": [0, 1]},
        {"full_attention_layers": None},
        {"ranking": [0]},
        {"ranking": [0, 0]},
        {"ranking": [0, 1.0]},
        {"ranking": [False, True]},
        {"ranking": [0, [1]]},
        {"ranking": "01"},
        {"mask": None},
        {"method": 1},
        {"source": None},
        {"budget": 0.25},
        {"revision": 7},
        {"profiles": [[0]]},
        {"profiles": {"deep": 0}},
        {"profiles": {"deep": ["0"]}},
    ],
    ids=str,
)
def test_a_plan_that_contradicts_itself_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(PlanError) as caught:
        plan_from_json(GOOD | changes, "plan.json")
    assert caught.value.details["where"] == "plan.json"
    assert plan_from_json(GOOD, "plan.json").layer_types == (FULL, SLIDING)


@pytest.mark.parametrize("layers", [[2], [-1], [0, 0]])
def test_a_profile_of_layers_that_are_not_there_is_refused(layers: list[int]) -> None:
    with pytest.raises(PlanError):
        plan_from_json(GOOD | {"profiles": {"deep": layers}}, "plan.json")


def test_a_missing_plan_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        load_plan(tmp_path / "plan.json")
    assert "hybridize plan" in caught.value.details["next step"]
