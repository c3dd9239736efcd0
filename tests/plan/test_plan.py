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
from converter.model.mask import FULL, SLIDING, Mask
from converter.plan.plan import Plan, layer_types_of, load_plan, plan_from_json


def plan_of(kinds: tuple[str, ...]) -> Plan:
    return Plan(kinds, Mask(16), "layers", None, None, "model", None)


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


def test_a_file_is_read_with_added_keys_and_a_missing_one_says_how_to_make_one(
    tmp_path: Path,
) -> None:
    path, plan = tmp_path / "plan.json", plan_of((FULL, SLIDING))
    with pytest.raises(PlanError) as caught:
        load_plan(path)
    assert "hybridize plan" in caught.value.details["next step"]
    path.write_text(json.dumps(plan.to_json() | {"kv_bytes": {"full": 1}}))
    assert load_plan(path) == plan


@given(plans())
def test_layers_and_kinds_say_the_same(plan: Plan) -> None:
    assert layer_types_of(plan.full_attention_layers, len(plan.layer_types)) == plan.layer_types
    assert plan.strip.replace(" ", "") == "".join(
        "█" if i in plan.full_attention_layers else "·" for i in range(len(plan.layer_types))
    )


def test_layers_may_be_named_in_any_order_and_are_shown_by_four() -> None:
    assert layer_types_of([2, 0], 3) == (FULL, SLIDING, FULL)
    assert layer_types_of([], 2) == (SLIDING, SLIDING)
    assert plan_of(layer_types_of([0, 5, 8], 9)).strip == "█··· ·█·· █"


@pytest.mark.parametrize(
    ("layers", "problem"),
    [([3], "no such layer"), ([-1], "no such layer"), ([1, 1], "named twice")],
)
def test_layers_that_the_model_does_not_have_are_refused(layers: list[int], problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        layer_types_of(layers, 3)


def test_a_plan_is_for_a_model_of_its_depth() -> None:
    plan = plan_of((FULL, SLIDING))
    plan.check_depth(2, "plan.json")
    with pytest.raises(PlanError, match="another depth") as caught:
        plan.check_depth(3, "plan.json")
    assert caught.value.details == {"where": "plan.json", "expected": "3 layers", "got": "2"}


GOOD = plan_of((FULL, SLIDING)).to_json()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("format_version", value) for value in (2, "1")),
        *(("layer_types", [FULL, other]) for other in ("other", {})),
        *(("layer_types", value) for value in ([SLIDING, SLIDING], {FULL: SLIDING})),
        *(("full_attention_layers", value) for value in ([1], [0, 1], None)),
        *(("ranking", value) for value in ([0], [0, 0], [0, 1.0], [False, True], [0, [1]], "01")),
        *(("mask", None), ("method", 1), ("source", None), ("budget", 0.25), ("revision", 7)),
        *(("profiles", value) for value in ([[0]], {"deep": 0})),
        *(("profiles", {"deep": layers}) for layers in (["0"], [2], [-1], [0, 0])),
    ],
    ids=str,
)
def test_a_plan_that_contradicts_itself_is_refused(key: str, value: Any) -> None:
    with pytest.raises(PlanError) as caught:
        plan_from_json(GOOD | {key: value}, "plan.json")
    assert caught.value.details["where"] in ("plan.json", "full_attention_layers (--layers)")
    assert plan_from_json(GOOD, "plan.json").layer_types == (FULL, SLIDING)
