"""Which plans are compared, and which cannot be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from converter.calibration.selectors import periodic_layers, periodic_offsets
from converter.common.errors import PlanError
from converter.common.files import write_json
from converter.evaluation.models import Variant, VariantSettings, variants_of
from converter.model.mask import Mask
from converter.model.source import Source, open_source
from converter.plan.plan import Plan, layer_types_of
from tests.tiny import tiny_model

TOTAL = 8


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("variants") / "tiny"
    return open_source(str(tiny_model(folder, num_hidden_layers=TOTAL)))


@pytest.fixture
def plan(source: Source) -> Plan:
    kinds = layer_types_of((2, 5), TOTAL)
    ranking = (5, 2, 7, 0, 1, 3, 4, 6)
    return Plan(kinds, Mask(16), "nll-restore", "1/4", ranking, source.name, None)


def test_budgets_follow_the_ranking(source: Source, plan: Plan) -> None:
    found = variants_of(source, plan, VariantSettings(budgets=("1/8", "1/2", "3")))
    assert found == (
        Variant("original", tuple(range(TOTAL)), "all"),
        Variant("hybrid", (2, 5), "nll-restore"),
        Variant("nll-restore 1/8", (5,), "nll-restore"),
        Variant("nll-restore 1/2", (0, 2, 5, 7), "nll-restore"),
        Variant("nll-restore 3", (2, 5, 7), "nll-restore"),
    )


@pytest.mark.parametrize("method", ["periodic, offset 1", "layers"])
def test_a_ranking_that_the_plan_was_not_made_by_has_no_methods_name(
    method: str, source: Source, plan: Plan
) -> None:
    """Of a checkpoint retargeted by hand, and of periodic layers that won the comparison."""
    budget = VariantSettings(budgets=("1/8",))
    *_, found = variants_of(source, replace(plan, method=method), budget)
    assert found == Variant("ranking 1/8", (5,), "ranking")


def test_a_budget_of_memory_is_met_under_the_checkpoints_mask(source: Source, plan: Plan) -> None:
    # 64 bytes a token in a layer: 512 tokens in a full one, 16 in a sliding one.
    size = 64 * (3 * 512 + 5 * 16)
    for limit, layers in ((size, (2, 5, 7)), (size - 1, (2, 5))):
        found = variants_of(source, plan, VariantSettings(budgets=(f"kv:{limit}B",)))
        assert found[-1].full_attention_layers == layers
    wider = replace(plan, mask=Mask(17))
    found = variants_of(source, wider, VariantSettings(budgets=(f"kv:{size}B",)))
    assert found[-1].full_attention_layers == (2, 5)


def test_periodic_plans_come_at_every_offset_of_every_count(source: Source, plan: Plan) -> None:
    found = variants_of(source, plan, VariantSettings(budgets=("1/8",), periodic=True))
    periodic = [v for v in found if v.method == "periodic"]
    assert [v.full_attention_layers for v in periodic] == [
        periodic_layers(TOTAL, count, offset)
        for count in (1, 2)
        for offset in range(periodic_offsets(TOTAL, count))
    ]


def test_plan_files_and_a_separate_original(source: Source, plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    other = replace(plan, layer_types=layer_types_of((1, 4), TOTAL), method="nll-remove")
    write_json(path, other.to_json())
    found = variants_of(source, plan, VariantSettings(plans=(path,), separate=True))
    assert found[-1].name == "other"
    assert (found[-1].full_attention_layers, found[-1].method) == ((1, 4), "nll-remove")
    # The same layers under another class are another computation.
    assert found[0].separate
    assert found[0].key != replace(found[0], separate=False).key


def test_plans_that_cannot_be_compared_are_told(source: Source, plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="not ranked"):
        variants_of(source, replace(plan, ranking=None), VariantSettings(budgets=("1/8",)))
    shallow = replace(plan, layer_types=plan.layer_types[:4], ranking=None)
    for name, other, message in (
        ("other", replace(plan, mask=Mask(17)), "another mask"),
        ("other", shallow, "another depth"),
        ("hybrid", plan, "same name"),
    ):
        path = tmp_path / f"{name}.json"
        write_json(path, other.to_json())
        with pytest.raises(PlanError, match=message):
            variants_of(source, plan, VariantSettings(plans=(path,)))
