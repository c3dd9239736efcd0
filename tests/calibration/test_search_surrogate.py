"""The stand-in: its weights are those of a ridge regression, and its search finds the optimum."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from converter.calibration.search.oracle import Losses
from converter.calibration.search.surrogate import Predict, propose, search, weights
from tests.oracles import Loss, Oracle, additive, optimum, subsets

Vectors = Callable[[frozenset[int]], NDArray[Any]]


def random_sets(total: int, count: int, seed: int) -> list[frozenset[int]]:
    """Different sets of any sizes."""
    rng = random.Random(seed)  # noqa: S311 - reproducible
    found: dict[frozenset[int], None] = {}
    while len(found) < min(count, 2**total):
        found[frozenset(rng.sample(range(total), rng.randint(0, total)))] = None
    return list(found)


def ridge_by_normal_equations(
    known: Sequence[frozenset[int]],
    vectors: NDArray[Any],
    sets: Sequence[frozenset[int]],
    total: int,
    ridge: float,
) -> NDArray[Any]:
    """The primal form, feature by feature: a constant that is not shrunk, and one per layer."""

    def features(given: Sequence[frozenset[int]]) -> NDArray[Any]:
        return np.array([[1.0, *(float(x in s) for x in range(total))] for s in given])

    f = features(known)
    shrink = np.diag([0.0, *[ridge] * total])
    coefficients = np.linalg.solve(f.T @ f + shrink, f.T @ vectors)
    foretold: NDArray[Any] = features(sets) @ coefficients
    return foretold


@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 1000))
def test_weights_are_those_of_the_regression(total: int, count: int, seed: int) -> None:
    known, sets = random_sets(total, count, seed), random_sets(total, 7, seed + 1)
    vectors = np.random.default_rng(seed).normal(size=(len(known), 5))
    given_weights = weights(known, sets, total)
    assert given_weights.shape == (len(sets), len(known))
    assert np.allclose(given_weights.sum(axis=1), 1)
    expected = ridge_by_normal_equations(known, vectors, sets, total, ridge=0.1)
    assert np.allclose(given_weights @ vectors, expected, atol=1e-8)


def test_vectors_that_add_up_are_foretold() -> None:
    parts = np.random.default_rng(0).normal(size=(13, 6))

    def vector(layers: frozenset[int]) -> NDArray[Any]:
        return parts[-1] + sum((parts[layer] for layer in layers), np.zeros(6))

    known, sets = random_sets(12, 200, 1), subsets(12, 4)
    foretold = weights(known, sets, 12) @ np.array([vector(layers) for layers in known])
    true = np.array([vector(layers) for layers in sets])
    assert np.abs(foretold - true).max() < 0.02 * np.abs(true).max()


def adding_up(gains: Sequence[float]) -> Predict:
    """Losses that are linear in vectors of one number each, the loss itself."""
    loss = additive(gains)

    def predict(known: Sequence[frozenset[int]], rows: NDArray[Any]) -> list[float]:
        return list(rows @ np.array([loss(layers) for layers in known]))

    return predict


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9, unique=True), st.data())
def test_proposals_are_the_best_sets_not_known(gains: list[int], data: st.DataObject) -> None:
    total, loss = len(gains), additive(gains)
    start = data.draw(st.frozensets(st.integers(0, total - 1)))
    known = [frozenset[int](), *subsets(total, 1), frozenset(range(total))]
    proposed = propose(adding_up(gains), known, [start], total, 5)
    sets = [one.layers for one in proposed]
    assert len(set(sets)) == len(sets) <= 5
    assert not set(sets) & set(known)
    assert {len(layers) for layers in sets} <= {len(start)}
    assert [one.loss for one in proposed] == sorted(one.loss for one in proposed)
    best = optimum(loss, total, len(start))
    assert best in known or sets[0] == best


def softmax(total: int, seed: int) -> tuple[Vectors, Callable[[NDArray[Any]], float], Loss]:
    """Logits that layers add to, alone and in pairs; a head that tells the answers' loss."""
    rng = np.random.default_rng(seed)
    rows, words = 12, 6
    own = rng.normal(size=(total, rows, words)) * rng.gamma(0.4, 1, size=(total, 1, 1))
    answers = rng.integers(0, words, rows)
    for row, word in enumerate(answers):
        own[:, row, word] += rng.gamma(0.3, 1.0, total)
    pairs = [
        (rng.choice(total, 2, replace=False), rng.normal(size=(rows, words)) / 2)
        for _ in range(total)
    ]

    def vector(layers: frozenset[int]) -> NDArray[Any]:
        logits = sum((own[layer] for layer in sorted(layers)), np.zeros((rows, words)))
        for (a, b), effect in pairs:
            logits = logits + effect * (a in layers and b in layers)
        return logits

    def head(logits: NDArray[Any]) -> float:
        normal = np.log(np.exp(logits).sum(axis=1))
        return float(np.mean(normal - logits[np.arange(rows), answers]))

    return vector, head, lambda layers: head(vector(layers))


def remembering(vector: Vectors, head: Callable[[NDArray[Any]], float], oracle: Oracle) -> Predict:
    """A stand-in that has the vectors of measured sets and of no others."""

    def predict(known: Sequence[frozenset[int]], rows: NDArray[Any]) -> list[float]:
        assert set(known) <= oracle.known.keys()
        vectors = np.array([vector(layers) for layers in known])
        return [head(np.tensordot(row, vectors, 1)) for row in rows]

    return predict


@pytest.mark.parametrize("seed", range(6))
def test_search_from_single_layers_finds_the_best_set_or_the_second(seed: int) -> None:
    total, count = 14, 5
    vector, head, loss = softmax(total, seed)
    oracle = Oracle(loss)
    known = [*subsets(total, 0), *subsets(total, 1)]
    oracle(known)
    start = frozenset(range(count))
    result = search(oracle, remembering(vector, head, oracle), known, [start], total)
    assert result.best.loss == loss(result.best.layers)
    better = [layers for layers in subsets(total, count) if loss(layers) < result.best.loss]
    # Of 2002 sets; on 24 seeds it was the best on 23.
    assert len(better) <= 1
    assert len(oracle.known) < 80
    assert result.known == tuple(oracle.known)
    # The search ended because three rounds found nothing better.
    best_before = min(one.loss for proposals in result.rounds[:-3] for one in proposals)
    assert best_before == result.best.loss
    for proposals in result.rounds:
        assert [one.loss for one in proposals] == [loss(one.layers) for one in proposals]
        foretold = [one.predicted for one in proposals]
        assert foretold == sorted(foretold)


def test_search_is_the_same_twice_and_stops_at_its_limit() -> None:
    vector, head, loss = softmax(36, 3)
    known = [*subsets(36, 0), *subsets(36, 1)]

    def run() -> tuple[object, int]:
        oracle = Oracle(loss)
        oracle(known)
        predict = remembering(vector, head, oracle)
        result = search(oracle, predict, known, [frozenset(range(9))], 36, count=6, rounds=2)
        return result, len(oracle.known)

    assert run() == run()
    assert run()[1] == len(known) + 1 + 2 * 6


@pytest.mark.parametrize("total", [1, 5])
def test_a_size_of_one_set_has_nothing_to_propose(total: int) -> None:
    losses: Losses = Oracle(additive([1] * total))
    for layers in (frozenset[int](), frozenset(range(total))):
        result = search(losses, adding_up([1] * total), [layers], [layers], total)
        assert (result.best.layers, result.rounds) == (layers, ())


def test_starts_have_one_size() -> None:
    losses = Oracle(additive([1, 2]))
    for starts in ([], [frozenset({0}), frozenset[int]()]):
        with pytest.raises(ValueError, match="one size"):
            search(losses, adding_up([1, 2]), [frozenset()], starts, 2)
