"""Ways of choosing that live in `benchmarks/` to be compared with the product's."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from math import comb
from pathlib import Path
from statistics import fmean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from converter.calibration.calibrate import CalibrationTask, calibrate
from converter.calibration.selectors import SELECTORS
from converter.calibration.selectors.base import Choice
from converter.calibration.selectors.gates import GateSettings
from converter.plan.units import Units
from tests.conftest import LAYERS
from tests.oracles import Oracle, arbitrary, lookups, optimum, subsets
from tests.runners import EXAMPLES, MASKS, resident, run, silent

# Benchmarks are scripts: they find each other beside them.
sys.path.append(str(Path(__file__).parent.parent.parent / "benchmarks"))

from rival_gates import learn_budgeted_gates
from rival_searches import beam, evolve
from rival_selectors import EVERY_SELECTOR, FIRST_ORDER, RIVALS

from tests.calibration.test_selectors_gates import Loss, best_of

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
    found = FIRST_ORDER.measure(runner, EXAMPLES, range(LAYERS), lambda _: None, Units(LAYERS))
    step = 1e-5
    for layer in range(LAYERS):
        gates = tuple((step if i == layer else 0.0,) for i in range(LAYERS))
        moved = runner.gate_gradients(EXAMPLES, gates, lambda _: None)
        for scores, there in zip(found, moved, strict=True):
            assert scores.sliding is not None
            slope = (scores.sliding - there.loss) / step
            assert scores.scores[layer] == pytest.approx(slope, rel=1e-2, abs=1e-5)


# --- searches and gates, each against what is found without them -------------------------------


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


@pytest.mark.parametrize("seed", range(4))
def test_evolution_finds_the_optimum_with_few_sets_on_all_examples(seed: int) -> None:
    common, own = lookups(16, seed), [lookups(16, 100 * seed + i) for i in range(32)]
    asked = Counter[int]()

    def losses(sets: Sequence[frozenset[int]], count: int) -> list[float]:
        asked[count] += len(sets)
        # Examples are mostly alike.
        return [common(s) + 0.2 * fmean(example(s) for example in own[:count]) for s in sets]

    found = evolve(losses, [frozenset(range(4))], 16, examples=32, generations=40, seed=seed)
    best = min(losses(subsets(16, 4), 32))
    asked[32] -= len(subsets(16, 4))
    assert found.loss == pytest.approx(best)
    # A generation is 32 sets on 2 examples, 8 on 8 and 2 on 32, and there are 1820 sets in all.
    assert asked == {2: 32 * 40, 8: 8 * 40, 32: 1 + 2 * 40}


@pytest.mark.parametrize("budget", [1, 2, 4])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_budget_goes_to_what_is_worth_most(budget: int, noise: float) -> None:
    worth = [[0.1, 2.0], [0.3, 0.0], [1.5, 0.9], [0.05, 0.2]]
    weights = torch.tensor(worth, dtype=torch.float64)
    loss = Loss(lambda gates: (weights * (1 - gates)).sum(), noise)
    settings = GateSettings(400, 0.05, 1)
    chances = learn_budgeted_gates(loss, (4, 2), settings, budget, 0.05)
    flat = [chance for row in chances for chance in row]
    assert best_of(flat, budget) == best_of([w for row in worth for w in row], budget)
    assert sum(flat) == pytest.approx(budget, abs=0.5)
