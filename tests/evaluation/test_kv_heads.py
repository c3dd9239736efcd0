"""Evaluating a checkpoint in which KV heads of one layer attend differently."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from converter.common.errors import PlanError
from converter.common.files import write_json
from converter.evaluation.cost import costs
from converter.evaluation.models import (
    HYBRID,
    ORIGINAL,
    Variant,
    VariantModels,
    VariantSettings,
    variants_of,
)
from converter.inference.generate import cache_bytes
from converter.model.mask import FULL, SLIDING
from converter.model.source import open_source
from converter.plan.plan import Plan
from tests.conftest import CONTEXT, LAYERS, run_cli
from tests.hybrids import load, random_ids
from tests.kv_heads import FULL_HEADS, KINDS, KV_HEADS, checkpoint_by_heads, grouped_model, mask_of

MASK = mask_of("sinks")
# Of these heads, the second and fourth layer's worth of KV bytes, and that plan of whole layers.
WHOLE = (SLIDING, FULL, SLIDING, FULL)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return grouped_model(tmp_path_factory.mktemp("grouped") / "model")


@pytest.fixture(scope="module")
def by_heads(source: Path) -> Path:
    return checkpoint_by_heads(source, source.parent / "by-heads", MASK)


def plan_file(folder: Path, kinds: tuple[str, ...]) -> Path:
    path = folder / f"plan-{kinds.count(SLIDING)}.json"
    write_json(path, Plan(kinds, MASK, "hand", None, None, "source", None).to_json())
    return path


def test_its_plan_runs_beside_plans_of_layers(source: Path, by_heads: Path, tmp_path: Path) -> None:
    opened = open_source(str(source))
    plan = Plan(KINDS, MASK, "hand", None, None, "source", None)
    others = VariantSettings(plans=(plan_file(tmp_path, WHOLE),))
    original, mine, layers = variants_of(opened, plan, others)
    assert [v.name for v in (original, mine, layers)] == [ORIGINAL, HYBRID, "plan-2"]
    assert mine.full_layers == Fraction(sum(FULL_HEADS), KV_HEADS)
    assert layers.full_layers == 2
    assert len({v.key for v in (original, mine, layers)}) == 3

    models, ids = VariantModels(load(by_heads), None, None), torch.tensor([random_ids(200)])
    for variant, kinds in ((mine, KINDS), (layers, WHOLE), (original, (FULL,) * 4), (mine, KINDS)):
        fresh = load(by_heads)
        fresh.set_layer_kinds(kinds)
        with torch.inference_mode():
            assert models.running(variant)(ids).logits.equal(fresh(ids).logits)


def test_its_cost_is_what_a_running_model_holds(source: Path, by_heads: Path) -> None:
    opened, hybrid = open_source(str(source)), load(by_heads, dtype="auto")
    variants = (
        Variant(HYBRID, (3,), "hand", False, KINDS, Fraction(sum(FULL_HEADS), KV_HEADS)),
        Variant("all", tuple(range(LAYERS)), "all"),
        Variant("none", (), "hand"),
    )
    mine, most, least = (rows[-1] for rows in costs(opened, variants, MASK).values())
    with torch.inference_mode():
        ids = torch.tensor([random_ids(CONTEXT)])
        held = cache_bytes(hybrid(ids, use_cache=True, logits_to_keep=1).past_key_values)
    current_token = Fraction(LAYERS * KV_HEADS - sum(FULL_HEADS), KV_HEADS)
    assert held == mine["kv_bytes"] - current_token * opened.shape.kv_bytes_per_token
    share = Fraction(sum(FULL_HEADS), LAYERS * KV_HEADS)
    between = least["prefill_flop"] + share * (most["prefill_flop"] - least["prefill_flop"])
    assert mine["prefill_flop"] == pytest.approx(float(between), rel=1e-12)


def test_heads_need_a_checkpoint_that_parts_them(source: Path, tmp_path: Path) -> None:
    opened = open_source(str(source))
    plan = Plan(WHOLE, MASK, "hand", None, None, "source", None)
    with pytest.raises(PlanError, match="parts the KV heads"):
        variants_of(opened, plan, VariantSettings(plans=(plan_file(tmp_path, KINDS),)))


def test_budgets_go_by_a_ranking_of_heads(source: Path) -> None:
    # KV head h of layer l has the number 4 * l + h.
    ranking = (13, 1, 3, 0, 2, *(set(range(16)) - {0, 1, 2, 3, 13}))
    plan = Plan(KINDS, MASK, "hand", None, ranking, "source", None)
    budgets = VariantSettings(budgets=("3", "5"))
    *_, three, five = variants_of(open_source(str(source)), plan, budgets)
    assert three.layer_types == ("mixed_attention:1,3", SLIDING, SLIDING, "mixed_attention:1")
    assert five.layer_types == (FULL, SLIDING, SLIDING, "mixed_attention:1")
    assert (three.full_layers, five.full_layers) == (Fraction(3, 4), Fraction(5, 4))


def test_a_report_is_written(by_heads: Path, tmp_path: Path) -> None:
    out, rows = tmp_path / "report", tmp_path / "rows.jsonl"
    asked = [{"prompt": "abcdefgh" * n, "answer": "ab"} for n in (5, 9)]
    rows.write_text("\n".join(map(json.dumps, asked)))
    options = (
        "--tasks",
        "none",
        "--rows",
        rows,
        "--plan",
        plan_file(tmp_path, WHOLE),
        "--speed-runs",
        1,
    )
    assert run_cli("evaluate", by_heads, *options, "--out", out, "-q") == 0
    found = json.loads((out / "evaluation.json").read_text())["variants"]
    assert found[HYBRID]["layer_types"] == list(KINDS)
    assert found[HYBRID]["full_layers"] == 1.75
    assert (found["plan-2"]["layer_types"], found["plan-2"]["full_layers"]) == (None, 2)
