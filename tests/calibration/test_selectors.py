"""Selectors: the table, scores of single layers and their costs, votes, evenly spaced plans."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.calibration.scores import ExampleScores, rank
from converter.calibration.selectors import (
    ALL,
    BEST,
    MEASURING,
    METHODS,
    NLL_RESTORE,
    SELECTORS,
    LayerSelector,
    periodic_layers,
    periodic_offsets,
    scorer_of,
    selectors_of,
)
from converter.calibration.selectors.lazy import LAZY, measure_laziness, votes
from converter.common.errors import PlanError
from converter.inference.example import Example
from converter.inference.gate_gradients import GateGradients, Gates
from converter.inference.positions import LayerTypes, token_spans
from converter.inference.runner import Advance, Answer
from converter.model.mask import FULL, SLIDING, Mask
from converter.plan.units import Units, switched_plans
from tests.conftest import LAYERS
from tests.runners import EXAMPLES as REAL_EXAMPLES
from tests.runners import ignore, resident


def test_every_method_is_in_one_table_by_its_name() -> None:
    assert (BEST, ALL, *SELECTORS) == METHODS
    assert len(set(METHODS)) == len(METHODS)
    assert all(one.name == name and one.summary for name, one in SELECTORS.items())
    assert {one.name for one in selectors_of(ALL)} == set(SELECTORS)
    assert (
        {one.name for one in selectors_of(BEST)} < set(MEASURING) == set(SELECTORS) - {"periodic"}
    )
    assert selectors_of("kl,periodic") == (SELECTORS["kl"], SELECTORS["periodic"])
    # Whose scores are of single layers says so itself; for the others restore-one stands in.
    assert scorer_of("kl") is SELECTORS["kl"]
    assert {scorer_of(name) for name in ("search", "lazy", "gone", "guided")} == {NLL_RESTORE}


class FakeRunner:
    """An answer's loss is 10 less what its full layers are worth; keeps how each call was made."""

    def __init__(self, worth: Sequence[float]) -> None:
        self.worth = worth
        self.layers = len(worth)
        self.mask = Mask(1024, 7)
        self.asked: list[Any] = []

    def answers(
        self, examples: Sequence[Example], plans: Sequence[LayerTypes], advance: Advance
    ) -> list[list[Answer]]:
        """As `ModelRunner.answers`."""
        self.asked.append(list(plans))
        advance(len(plans))
        gains = [
            sum(w for w, kind in zip(self.worth, p, strict=True) if kind == FULL) for p in plans
        ]
        return [[Answer(10 - len(e.answer) * gain, True) for gain in gains] for e in examples]

    def gate_gradients(
        self, examples: Sequence[Example], weights: Gates, advance: Advance
    ) -> list[GateGradients]:
        """As `ModelRunner.gate_gradients`, for one weight that all layers share."""
        ((weight,),) = set(weights)
        self.asked.append(weight)
        advance(1)
        # As if the loss went with the square of the gates, which midpoints integrate exactly.
        return [
            GateGradients(
                10 - weight**2 * len(example.answer) * sum(self.worth),
                tuple((-2 * weight * len(example.answer) * w,) for w in self.worth),
            )
            for example in examples
        ]

    def divergences(
        self,
        examples: Sequence[Example],
        plans: Sequence[LayerTypes],
        advance: Advance,
        *,
        every_row: bool,
    ) -> list[list[float]]:
        """As `ModelRunner.divergences`: what the sliding layers are worth."""
        self.asked.append(every_row)
        advance(1)
        off = [sum(w for w, k in zip(self.worth, p, strict=True) if k == SLIDING) for p in plans]
        return [[len(example.answer) * value for value in off] for example in examples]

    def attention_mass(
        self, examples: Sequence[Example], advance: Advance, **limits: int
    ) -> list[list[float]]:
        """As `ModelRunner.attention_mass`."""
        self.asked.append(limits)
        advance(1)
        return [[0.75, 1.0, 1 / len(example.prompt)] for example in examples]


EXAMPLES = [Example((1,) * 50, (2,), "pair"), Example((1,) * 80, (2, 3), "link")]
WORTH = (0.5, -0.25, 2.0)


@pytest.mark.parametrize("others", [FULL, SLIDING])
def test_a_variant_switches_one_layer(others: str) -> None:
    uniform, *plans = switched_plans(others, Units(5), range(5))
    assert uniform == (others,) * 5
    for layer, switched in enumerate(plans):
        assert len(switched) == 5
        assert [i for i in range(5) if switched[i] != others] == [layer]


@pytest.mark.parametrize("method", ["nll-restore", "nll-remove"])
@pytest.mark.parametrize("layers", [(0, 1, 2), (2,), (2, 0)], ids=str)
def test_a_layer_that_matters_scores_above_zero(method: str, layers: tuple[int, ...]) -> None:
    """Restoring it lowers the loss of a sliding model; removing it raises that of a full one."""
    runner, done = FakeRunner(WORTH), list[float]()
    found = scorer_of(method).measure(runner, EXAMPLES, layers, done.append, Units(len(WORTH)))  # type: ignore[arg-type]
    restores = method == "nll-restore"
    assert done == [1 + len(layers)]
    for example, scores in zip(EXAMPLES, found, strict=True):
        times = len(example.answer)
        assert scores == ExampleScores(
            kind=example.kind,
            prompt_tokens=len(example.prompt),
            answer_tokens=times,
            full=None if restores else 10 - times * sum(WORTH),
            sliding=10 if restores else None,
            scores=tuple(times * WORTH[i] if i in layers else None for i in range(3)),
        )
    # The switch goes the way the name says: what is asked for are the right models.
    for plan in runner.asked[0][1:]:
        assert sum(kind == (FULL if restores else SLIDING) for kind in plan) == 1


@pytest.mark.parametrize("layers", [(0, 1, 2), (2,), (2, 0)], ids=str)
def test_a_layer_that_brings_the_model_nearer_scores_above_zero(layers: tuple[int, ...]) -> None:
    runner, done = FakeRunner(WORTH), list[float]()
    found = scorer_of("kl").measure(runner, EXAMPLES, layers, done.append, Units(len(WORTH)))  # type: ignore[arg-type]
    assert (runner.asked, done) == ([False], [1])
    for example, scores in zip(EXAMPLES, found, strict=True):
        times = len(example.answer)
        assert (scores.full, scores.sliding) == (None, None)
        assert scores.scores == tuple(times * WORTH[i] if i in layers else None for i in range(3))


def test_a_layer_that_looks_far_scores_above_a_lazy_one() -> None:
    runner = FakeRunner(WORTH)
    found = measure_laziness(runner, EXAMPLES, ignore)  # type: ignore[arg-type]
    # The paper's sinks and rows, and the window that is deployed.
    assert runner.asked == [{"sinks": 4, "recent": 1024, "last": 32}]
    assert [(s.kind, s.full, s.sliding, s.scores) for s in found] == [
        ("pair", None, None, (0.25, 0.0, 1 - 1 / 50)),
        ("link", None, None, (0.25, 0.0, 1 - 1 / 80)),
    ]


def test_a_path_integral_sums_to_the_gap() -> None:
    runner = FakeRunner(WORTH)
    found = scorer_of("path-integral").measure(
        runner, EXAMPLES, (), lambda _: None, Units(len(WORTH))
    )  # type: ignore[arg-type]
    weights = runner.asked[1:]
    assert len(weights) == 8
    assert sum(weights) / 8 == 0.5
    assert 0 < min(weights) < max(weights) < 1
    for example, scores in zip(EXAMPLES, found, strict=True):
        assert scores.scores == pytest.approx([len(example.answer) * w for w in WORTH])
        assert scores.full is not None
        assert scores.sliding is not None
        assert sum(s or 0 for s in scores.scores) == pytest.approx(scores.sliding - scores.full)


@given(
    layers=st.sets(st.integers(0, 4), min_size=1),
    prompt=st.integers(2, 90),
    answer=st.integers(1, 6),
    mask=st.builds(Mask, st.integers(1, 40), st.integers(0, 4), st.booleans()),
)
def test_scoring_fewer_layers_costs_less_only_where_the_selector_says_so(
    layers: set[int], prompt: int, answer: int, mask: Mask
) -> None:
    spans = token_spans(Example((1,) * prompt, (2,) * answer, ""), mask)
    for selector in SELECTORS.values():
        if not isinstance(selector, LayerSelector):
            continue
        some = selector.cost_of_scoring(spans, mask, Units(5), sorted(layers))
        every = selector.cost_of_scoring(spans, mask, Units(5), range(5))
        assert 0 < some <= every == selector.cost(spans, mask, Units(5), 2)
        assert (some < every) == (selector.separable and len(layers) < 5)


@pytest.mark.parametrize("mask", [Mask(16), Mask(16, 3, True), Mask(200)], ids=str)
def test_costs_are_those_of_the_model(mask: Mask, sources: dict[str, Path]) -> None:
    runner = resident(sources["qwen3"], mask)
    spans = [token_spans(example, mask) for example in REAL_EXAMPLES]
    for name in ("nll-restore", "nll-remove", "kl", "path-integral"):
        for layers in (range(LAYERS), [2], [3, 1]):
            done: list[float] = []
            scorer_of(name).measure(runner, REAL_EXAMPLES, layers, done.append, Units(LAYERS))
            costs = [
                scorer_of(name).cost_of_scoring(one, mask, Units(LAYERS), layers) for one in spans
            ]
            assert sum(done) == pytest.approx(sum(costs))
    done = []
    measure_laziness(runner, REAL_EXAMPLES, done.append)
    assert sum(done) == pytest.approx(sum(LAZY.cost(one, mask, Units(LAYERS), 2) for one in spans))


def test_no_layer_restores_more_than_there_is_to_gain(sources: dict[str, Path]) -> None:
    """KL is never below 0, and it is 0 when every layer is full."""
    runner = resident(sources["llama"], Mask(16, 3))
    found = scorer_of("kl").measure(runner, REAL_EXAMPLES, range(LAYERS), ignore, Units(LAYERS))
    ends = [(SLIDING,) * LAYERS, (FULL,) * LAYERS]
    gaps = runner.divergences(REAL_EXAMPLES, ends, ignore, every_row=False)
    for scores, (gap, nothing) in zip(found, gaps, strict=True):
        assert nothing == 0
        assert all(s is not None and s <= gap + 1e-12 for s in scores.scores)


SHARES = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])


@given(
    st.integers(1, 6).flatmap(
        lambda total: st.tuples(
            st.lists(st.lists(SHARES, min_size=total, max_size=total), min_size=1, max_size=5),
            st.integers(0, total),
        )
    )
)
def test_votes_are_counted_for_every_prompt(pair: tuple[list[list[float]], int]) -> None:
    """Against counting who is beaten by fewer than `keep` others."""
    rows, keep = pair
    total = len(rows[0])
    tally = [
        sum(sum(r[j] > r[i] or (r[j] == r[i] and j < i) for j in range(total)) < keep for r in rows)
        for i in range(total)
    ]
    order = votes(rows, keep)
    assert sorted(order) == list(range(total))
    # Shares are quarters, so these sums are exact.
    standing = [(tally[i], sum(r[i] for r in rows), -i) for i in order]
    assert standing == sorted(standing, reverse=True)


@given(st.lists(st.floats(-1e6, 1e6) | st.sampled_from([0.0, -0.0, 1.0]), max_size=40))
def test_a_ranking_is_by_descending_score_and_equal_ones_keep_their_order(
    scores: list[float],
) -> None:
    order = rank(scores)
    assert sorted(order) == list(range(len(scores)))
    for first, second in pairwise(order):
        assert scores[first] > scores[second] or (
            scores[first] == scores[second] and first < second
        )


@given(st.integers(1, 120).flatmap(lambda total: st.tuples(st.just(total), st.integers(1, total))))
def test_periodic_plans_are_distinct_in_range_and_evenly_spaced_and_no_further_offset_fits(
    pair: tuple[int, int],
) -> None:
    total, count = pair
    offsets = periodic_offsets(total, count)
    plans = [periodic_layers(total, count, offset) for offset in range(offsets)]
    assert len(set(plans)) == len(plans) >= 1
    for offset, plan in enumerate(plans):
        assert plan[0] == offset
        assert len(set(plan)) == count
        assert all(0 <= layer < total for layer in plan)
        gaps = [b - a for a, b in pairwise(plan)]
        assert all(gap in (total // count, -(-total // count)) for gap in gaps)
    assert plans[-1][-1] == total - 1
    for offset in (offsets, -1):
        with pytest.raises(PlanError, match="out of range") as caught:
            periodic_layers(total, count, offset)
        assert caught.value.details["expected"] == f"0 to {offsets - 1}"


def test_every_layer_is_kept_by_some_offset_when_the_period_divides_the_depth() -> None:
    plans = [periodic_layers(12, 3, offset) for offset in range(periodic_offsets(12, 3))]
    assert plans == [(0, 4, 8), (1, 5, 9), (2, 6, 10), (3, 7, 11)]
    assert (periodic_offsets(12, 0), periodic_layers(12, 0, 0)) == (1, ())
