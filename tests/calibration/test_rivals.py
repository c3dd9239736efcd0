"""Ways of choosing that live in `benchmarks/` to be compared with the product's."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from math import comb
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.calibration.calibrate import CalibrationTask, calibrate
from converter.calibration.selectors import SELECTORS
from converter.calibration.selectors.base import Choice
from converter.calibration.selectors.gates import GateSettings
from converter.calibration.selectors.search import greedy_order
from tests.conftest import LAYERS
from tests.oracles import Loss, Oracle, additive, arbitrary, lookups, optimum, patient_greedy
from tests.runners import EXAMPLES, MASKS, resident, run, silent

# Benchmarks are scripts: they find each other beside them.
sys.path.append(str(Path(__file__).parent.parent.parent / "benchmarks"))

from rival_gates import learn_budgeted_gates
from rival_searches import beam, evolve
from rival_selectors import EVERY_SELECTOR, FIRST_ORDER, RIVALS

from tests.calibration.test_selectors_gates import best_of, pair_of_layers, sums

# --- as selectors -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, one in RIVALS.items() if one.measures])
def test_a_rival_is_calibrated_by_and_orders_all_layers(
    name: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    assert not RIVALS.keys() & SELECTORS.keys()
    measured = run(sources["qwen3"], EXAMPLES, MASKS["plain"], tmp_path)
    rival = RIVALS[name]
    scores = calibrate(measured, CalibrationTask((rival,), 2), silent).scores
    assert (scores.method, scores.unit) == (name, rival.unit)
    assert sorted(scores.order) == list(range(LAYERS))


def test_rivals_that_do_not_measure_are_known_plans() -> None:
    class Sizes:
        total = 7

    def kept(name: str) -> tuple[int, ...]:
        choice: Choice = EVERY_SELECTOR[name].choose(Sizes(), 3)  # type: ignore[arg-type]
        assert sorted(choice.order) == list(range(7))
        return choice.order[:3]

    assert [kept(name) for name in ("first", "last", "middle", "periodic")] == [
        (0, 1, 2),
        (4, 5, 6),
        (2, 3, 4),
        (0, 2, 4),
    ]
    drawn = [kept(f"random, seed {seed}") for seed in range(3)]
    assert len(set(drawn)) > 1


@pytest.mark.usefixtures("exactly")
def test_first_order_is_the_slope_at_the_sliding_end(sources: dict[str, Path]) -> None:
    runner = resident(sources["qwen3"], MASKS["plain"])
    found = FIRST_ORDER.measure(runner, EXAMPLES, range(LAYERS), lambda _: None)
    step = 1e-5
    for layer in range(LAYERS):
        gates = tuple((step if i == layer else 0.0,) for i in range(LAYERS))
        moved = runner.gate_gradients(EXAMPLES, gates, lambda _: None)
        for scores, there in zip(found, moved, strict=True):
            assert scores.sliding is not None
            slope = (scores.sliding - there.loss) / step
            assert scores.scores[layer] == pytest.approx(slope, rel=1e-2, abs=1e-5)


# --- beam -------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.integers(1, 7), st.sampled_from([3, 1_000_000]))
def test_a_beam_wide_enough_finds_the_best_set_of_every_count(
    seed: int, total: int, values: int
) -> None:
    loss = arbitrary(seed, values)
    found = beam(Oracle(loss), total, total, width=comb(total, total // 2))
    for count, best in enumerate(found):
        assert best.layers == optimum(loss, total, count)
        assert best.loss == loss(best.layers)
    assert len(found) == total + 1


def test_a_beam_of_one_is_greedy_and_a_wider_one_outlives_an_early_mistake() -> None:
    sets = [best.layers for best in beam(Oracle(arbitrary(3)), 8, 8, width=1)]
    assert sets == [frozenset(patient_greedy(arbitrary(3), 8)[:count]) for count in range(9)]

    def loss(layers: frozenset[int]) -> float:
        # The best single layer is a poor half of a pair.
        return 10.0 - 3 * (0 in layers) - 2 * (len(layers & {1, 2}) > 0) - 6 * ({1, 2} <= layers)

    assert 0 in greedy_order(Oracle(loss), 6, 2)[:2]
    assert beam(Oracle(loss), 6, 2, width=2)[2].layers == {1, 2} == optimum(loss, 6, 2)


def test_a_beam_measures_far_less_than_all_sets() -> None:
    oracle = Oracle(lookups(36, 1))
    found = beam(oracle, 36, 9, width=4)
    assert [len(best.layers) for best in found] == list(range(10))
    # Of each of four members at most two quarters of its layers a step, in one call.
    assert len(oracle.known) <= 37 + 4 * sum(2 * -(-left // 4) for left in range(28, 36))
    assert len([call for call in oracle.calls if call]) == 9


# --- evolution --------------------------------------------------------------------------------


def by_example(losses: Sequence[Loss]) -> tuple[Callable[..., list[float]], dict[int, int]]:
    """An oracle over the first examples, and how many sets it was asked for, by their number."""
    asked: dict[int, int] = {}

    def partial(sets: Sequence[frozenset[int]], examples: int) -> list[float]:
        asked[examples] = asked.get(examples, 0) + len(sets)
        return [fmean(loss(layers) for loss in losses[:examples]) for layers in sets]

    return partial, asked


def alike(common: Loss, own: Loss) -> Loss:
    """An example that is mostly like all others."""
    return lambda layers: common(layers) + 0.2 * own(layers)


@pytest.mark.parametrize("seed", range(4))
def test_evolution_finds_the_optimum_with_few_sets_on_all_examples(seed: int) -> None:
    examples = [alike(lookups(16, seed), lookups(16, 100 * seed + i)) for i in range(32)]
    losses, asked = by_example(examples)
    found = evolve(losses, [frozenset(range(4))], 16, examples=32, generations=40, seed=seed)

    def loss(layers: frozenset[int]) -> float:
        return fmean(one(layers) for one in examples)

    assert found.loss == pytest.approx(loss(optimum(loss, 16, 4)))
    # A generation is 32 sets on 2 examples, 8 on 8 and 2 on 32, and there are 1820 sets in all.
    assert asked == {2: 32 * 40, 8: 8 * 40, 32: 1 + 2 * 40}


def test_evolution_is_the_same_for_a_seed_and_starts_from_the_best() -> None:
    losses, _ = by_example([lookups(20, i) for i in range(8)])
    starts = [frozenset(range(5)), frozenset(range(5, 10)), frozenset(range(10, 15))]

    def found(seed: int, generations: int) -> frozenset[int]:
        options = {"examples": 8, "generations": generations, "offspring": 8}
        return evolve(losses, starts, 20, seed=seed, **options).layers

    assert found(1, 6) == found(1, 6)
    assert len({found(seed, 6) for seed in range(4)}) > 1
    assert found(1, 0) == min(starts, key=lambda layers: losses([layers], 8)[0])


def test_evolution_ends_when_nothing_is_left_to_draw_and_wants_starts_of_one_size() -> None:
    losses, asked = by_example([additive([1, 2, 3])])
    for layers in (frozenset[int](), frozenset(range(3))):
        assert evolve(losses, [layers], 3, examples=1, generations=5).layers == layers
    asked.clear()
    assert evolve(losses, [frozenset({0})], 3, examples=1, generations=50).layers == {2}
    assert asked[1] < 50
    for starts in ([], [frozenset({1}), frozenset({1, 2})]):
        with pytest.raises(ValueError, match="one size"):
            evolve(losses, starts, 3, examples=1, generations=1)


# --- gates under a budget ---------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 2, 4])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_budget_goes_to_what_is_worth_most(budget: int, noise: float) -> None:
    worth = [[0.1, 2.0], [0.3, 0.0], [1.5, 0.9], [0.05, 0.2]]
    settings = GateSettings(400, 0.05, 1)
    chances = learn_budgeted_gates(sums(worth, noise), (4, 2), settings, budget, 0.05)
    flat = [chance for row in chances for chance in row]
    assert best_of(flat, budget) == best_of([w for row in worth for w in row], budget)
    assert sum(flat) == pytest.approx(budget, abs=0.5)


def test_a_budget_finds_layers_that_work_together() -> None:
    chances = learn_budgeted_gates(pair_of_layers(), (6, 1), GateSettings(400, 0.05, 1), 2, 0.05)
    assert best_of([chance for (chance,) in chances], 2) == {1, 4}


def test_drawn_gates_are_hard_concrete() -> None:
    """How often they are 0 and 1, by the distribution's closed form (arXiv 1712.01312)."""
    oracle = sums([[0.0]] * 40)
    # A learning rate of 0 leaves the log odds where they begin.
    chances = learn_budgeted_gates(oracle, (40, 1), GateSettings(400, 0.0, 1), 20, 0.0)
    drawn = [gate for _, gates in oracle.asked for (gate,) in gates]
    log_odds = 2.0
    open_, whole = (
        1 / (1 + math.exp(-log_odds + 2 / 3 * math.log(odds))) for odds in (0.1 / 1.1, 1.1 / 0.1)
    )
    assert chances[0][0] == pytest.approx(open_)
    assert sum(gate > 0 for gate in drawn) / len(drawn) == pytest.approx(open_, abs=0.01)
    assert sum(gate == 1 for gate in drawn) / len(drawn) == pytest.approx(whole, abs=0.015)
    assert all(0 <= gate <= 1 for gate in drawn)
