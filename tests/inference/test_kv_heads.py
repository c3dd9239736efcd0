"""Layers of which some KV heads attend fully and the others slide."""

from __future__ import annotations

import random
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest

from converter.inference.positions import LayerTypes
from converter.inference.runner import ModelRunner
from converter.model.mask import FULL, SLIDING, kind_of_heads
from tests.brute_force import EagerModel
from tests.conftest import FAMILIES, LAYERS, MORE_FAMILIES, Models
from tests.inference.conftest import Runners, assert_close, whole_logits
from tests.kv_heads import KV_HEADS, grouped_model
from tests.runners import EXAMPLES, MASKS, ignore, loss, nlls, resident, streamed

pytestmark = pytest.mark.usefixtures("exactly")

CLOSE = 1e-10
# Every set of some of the KV heads.
KINDS = [
    kind_of_heads(set_, KV_HEADS)
    for n in range(KV_HEADS + 1)
    for set_ in combinations(range(KV_HEADS), n)
]


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return grouped_model(tmp_path_factory.mktemp("grouped") / "model")


@pytest.fixture(scope="module")
def runners(grouped: Path) -> Runners:
    return cache(lambda mask: resident(grouped, MASKS[mask]))


def random_plans(count: int, seed: object) -> list[LayerTypes]:
    generator = random.Random(str(seed))  # noqa: S311 - reproducible
    return [tuple(generator.choices(KINDS, k=LAYERS)) for _ in range(count)]


def expected(model: EagerModel, mask: str, plans: list[LayerTypes]) -> list[list[float]]:
    """Nothing of ours: transformers' eager code under masks that were written down by head."""
    return [
        [
            loss(
                whole_logits(model, example, kinds, MASKS[mask])[len(example.prompt) - 1 :], example
            )
            for kinds in plans
        ]
        for example in EXAMPLES
    ]


@pytest.mark.parametrize("mask", MASKS)
def test_heads_attend_as_explicit_masks_have_it(mask: str, grouped: Path, runners: Runners) -> None:
    plans = [*random_plans(6, mask), (FULL,) * LAYERS, (SLIDING,) * LAYERS]
    found = nlls(runners(mask), EXAMPLES, plans)
    assert_close(found, expected(EagerModel(grouped), mask, plans), CLOSE)


def test_layers_read_from_disk_and_few_branches_at_a_time_answer_the_same(
    grouped: Path, runners: Runners
) -> None:
    plans = random_plans(6, "few")
    found = nlls(runners("sinks"), EXAMPLES, plans)
    few = resident(grouped, MASKS["sinks"], batch_rows=1)
    for other in (few, streamed(grouped, MASKS["sinks"])):
        assert_close(nlls(other, EXAMPLES, plans), found)


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_every_family_has_heads_that_slide_alone(
    family: str, eager: Models, runner: Runners
) -> None:
    """The query heads of these models are two to a KV head, of which there are two."""
    pair = ("mixed_attention:0", "mixed_attention:1")
    plans = [pair * 2, (*pair, FULL, SLIDING), (SLIDING, *pair, SLIDING)]
    found = nlls(runner(family, "sinks"), EXAMPLES, plans)
    assert_close(found, expected(eager(family), "sinks", plans), CLOSE)


def test_gates_that_are_shut_or_open_by_head_are_that_mixture(runners: Runners) -> None:
    runner: ModelRunner = runners("plain")
    gates = tuple(
        tuple(float(layer != head % 3) for head in range(KV_HEADS)) for layer in range(LAYERS)
    )
    kinds = tuple(kind_of_heads([h for h, g in enumerate(row) if g], KV_HEADS) for row in gates)
    (at_gates,) = runner.gate_gradients(EXAMPLES[:1], gates, ignore)
    assert_close(at_gates.loss, nlls(runner, EXAMPLES[:1], [kinds])[0][0], CLOSE)


def test_a_mixture_of_heads_costs_the_rows_of_a_full_layer(runners: Runners) -> None:
    runner: ModelRunner = runners("plain")
    costs = []
    for kind in (FULL, "mixed_attention:2"):
        cost: list[float] = []
        runner.answers(EXAMPLES[:1], [(SLIDING, kind, SLIDING, SLIDING)], cost.append)
        costs.append(sum(cost))
    assert costs[0] == costs[1]
