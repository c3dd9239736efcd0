"""Layers by KL and by laziness: signs, what is left out, the vote, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.calibration.selectors.base import ExampleScores
from converter.calibration.selectors.kl import kl_cost, measure_kl
from converter.calibration.selectors.lazy import lazy_cost, measure_laziness, votes
from converter.inference.example import Example
from converter.inference.positions import LayerTypes, token_spans
from converter.inference.runner import Advance
from converter.model.mask import FULL, SLIDING, Mask
from tests.conftest import LAYERS
from tests.runners import EXAMPLES, ignore, resident

WORTH = (0.5, -0.25, 2.0)
TWO = [Example((1,) * 50, (2,), "pair"), Example((1,) * 80, (2, 3), "link")]


class FakeMeter:
    """A model in which a plan is as far off as what its sliding layers are worth.

    Attributes:
        asked: how each call was made.
    """

    def __init__(self) -> None:
        self.layers = len(WORTH)
        self.mask = Mask(1024, 7)
        self.asked: list[object] = []

    def divergences(
        self,
        examples: Sequence[Example],
        plans: Sequence[LayerTypes],
        advance: Advance,
        *,
        every_row: bool,
    ) -> list[list[float]]:
        """As `ModelRunner.divergences`."""
        self.asked.append(every_row)
        advance(1)
        off = [sum(w for w, k in zip(WORTH, p, strict=True) if k == SLIDING) for p in plans]
        return [[len(example.answer) * value for value in off] for example in examples]

    def attention_mass(
        self, examples: Sequence[Example], advance: Advance, **limits: int
    ) -> list[list[float]]:
        """As `ModelRunner.attention_mass`."""
        self.asked.append(limits)
        advance(1)
        return [[0.75, 1.0, 1 / len(example.prompt)] for example in examples]


@pytest.mark.parametrize("every_row", [False, True])
@pytest.mark.parametrize("layers", [(0, 1, 2), (2,), (2, 0)], ids=str)
def test_a_layer_that_brings_the_model_nearer_scores_above_zero(
    layers: tuple[int, ...], every_row: bool
) -> None:
    runner, done = FakeMeter(), list[float]()
    found = measure_kl(runner, TWO, layers, done.append, every_row=every_row)  # type: ignore[arg-type]
    assert (runner.asked, done) == ([every_row], [1])
    for example, scores in zip(TWO, found, strict=True):
        assert scores == ExampleScores(
            kind=example.kind,
            prompt_tokens=len(example.prompt),
            answer_tokens=len(example.answer),
            full=None,
            sliding=None,
            scores=tuple(len(example.answer) * WORTH[i] if i in layers else None for i in range(3)),
        )


def test_a_layer_that_looks_far_scores_above_a_lazy_one() -> None:
    runner = FakeMeter()
    found = measure_laziness(runner, TWO, (), ignore)  # type: ignore[arg-type]
    # The paper's sinks and rows, and the window that is deployed.
    assert runner.asked == [{"sinks": 4, "recent": 1024, "last": 32}]
    assert [(s.kind, s.full, s.sliding) for s in found] == [
        ("pair", None, None),
        ("link", None, None),
    ]
    assert [s.scores for s in found] == [(0.25, 0.0, 1 - 1 / 50), (0.25, 0.0, 1 - 1 / 80)]


@pytest.mark.parametrize("mask", [Mask(16), Mask(16, 3, True), Mask(200)], ids=str)
def test_costs_are_those_of_the_model(mask: Mask, sources: dict[str, Path]) -> None:
    runner = resident(sources["qwen3"], mask)
    extents = [token_spans(example, mask) for example in EXAMPLES]
    for layers in (range(LAYERS), [2], [3, 1]):
        for every_row in (False, True):
            done: list[float] = []
            measure_kl(runner, EXAMPLES, layers, done.append, every_row=every_row)
            costs = [kl_cost(e, mask, LAYERS, layers, every_row=every_row) for e in extents]
            assert sum(done) == pytest.approx(sum(costs))
        done = []
        measure_laziness(runner, EXAMPLES, layers, done.append)
        assert sum(done) == pytest.approx(sum(lazy_cost(e, mask, LAYERS, layers) for e in extents))


def test_no_layer_restores_more_than_there_is_to_gain(sources: dict[str, Path]) -> None:
    """KL is never below 0, and it is 0 when every layer is full."""
    runner = resident(sources["llama"], Mask(16, 3))
    for every_row in (False, True):
        found = measure_kl(runner, EXAMPLES, range(LAYERS), ignore, every_row=every_row)
        gaps = runner.divergences(
            EXAMPLES, [(SLIDING,) * LAYERS, (FULL,) * LAYERS], ignore, every_row=every_row
        )
        for scores, (gap, nothing) in zip(found, gaps, strict=True):
            assert nothing == 0
            assert all(s is not None and s <= gap + 1e-12 for s in scores.scores)


def scores_of(*rows: Sequence[float]) -> list[ExampleScores]:
    return [ExampleScores("", 1, 1, None, None, tuple(row)) for row in rows]


def test_known_votes() -> None:
    table = scores_of((0.9, 0.8, 0.0, 0.1), (0.2, 0.8, 0.9, 0.1), (0.6, 0.5, 0.4, 0.1))
    # Each prompt's best two: 0 and 1, 2 and 1, 0 and 1.
    assert votes(table, 2, inverted=False) == (1, 0, 2, 3)
    # Each one's best: 0, 2, 0. Layer 1, whose mean is the highest, has no vote.
    assert votes(table, 1, inverted=False) == (0, 2, 1, 3)
    # The laziest: 2, 3, 3.
    assert votes(table, 1, inverted=True) == (3, 2, 0, 1)
    # Nobody votes, or everybody for all: by mean score.
    assert votes(table, 0, inverted=False) == votes(table, 4, inverted=False) == (1, 0, 2, 3)
    assert votes(table, 4, inverted=True) == (3, 2, 0, 1)
    assert votes(scores_of((0.5, 0.5, 0.5)), 1, inverted=False) == (0, 1, 2)


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
    for inverted in (False, True):
        signed = [[-s if inverted else s for s in row] for row in rows]
        tally = [
            sum(
                sum(r[j] > r[i] or (r[j] == r[i] and j < i) for j in range(total)) < keep
                for r in signed
            )
            for i in range(total)
        ]
        order = votes(scores_of(*rows), keep, inverted=inverted)
        assert sorted(order) == list(range(total))
        # Shares are quarters, so these sums are exact.
        standing = [(tally[i], sum(r[i] for r in signed), -i) for i in order]
        assert standing == sorted(standing, reverse=True)
