"""Guided search against the search that measures every layer, on made-up losses of deep models.

    python benchmarks/synthetic_search.py

Questions are chains of one to three lookups, each shared by one to five layers: layers stand
in for each other and need each other; examples are draws of them with strengths of their own.
What a search runs is counted in layer-forwards, for prompts of 16k tokens and a window of 2048.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from functools import partial
from statistics import fmean, stdev

import numpy as np

from converter.calibration.selectors.guided import (
    EFFORTS,
    GRADIENT_PASSES,
    TRIES,
    Oracle,
    guided_set,
    nested_order,
    path_order,
)
from converter.calibration.selectors.search import greedy_order, refine, typical_cost
from converter.inference.gate_gradients import Gates
from converter.inference.positions import TokenSpans, gradient_layer_forwards, layer_forwards
from converter.model.mask import FULL, Mask
from converter.plan.plan import layer_types_of
from converter.plan.units import Units

MASK, SPANS = Mask(2048), TokenSpans(2048, 16383, 16420, 16384)
EXAMPLES, TEST, QUESTIONS, HELPERS = 64, 1024, 24, 5
NESTED = (2, 5, 9, 14, 18, 24, 30)
Set = frozenset[int]
# Layers, strengths: (examples, lookups, helpers); whether there is such a lookup.
Drawn = tuple[np.ndarray, np.ndarray, np.ndarray]


class Problem:
    """Losses of sets on calibration examples, what asking costs, and the loss on many others."""

    def __init__(self, layers: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        shape = (QUESTIONS, 3, HELPERS)
        who, strength = np.zeros(shape, int), np.zeros(shape)
        needed = np.zeros(shape[:2], bool)
        for question in range(QUESTIONS):
            for lookup in range(rng.choice([1, 1, 2, 2, 3])):
                count = rng.integers(1, HELPERS + 1)
                needed[question, lookup] = True
                who[question, lookup, :count] = rng.choice(layers, count, replace=False)
                strength[question, lookup, :count] = rng.beta(0.6, 0.6, count)

        def draw(examples: int) -> Drawn:
            drawn = rng.integers(0, QUESTIONS, examples)
            share = np.clip(strength[drawn], 1e-3, 1 - 1e-3)
            odds = np.log(share / (1 - share)) + rng.normal(0, 0.5, share.shape)
            own = np.where(strength[drawn] > 0, 1 / (1 + np.exp(-odds)), 0)
            return who[drawn], own, needed[drawn]

        self.layers, self.spent = layers, 0.0
        self._scored, self._test = draw(EXAMPLES), draw(TEST)
        self._seen: dict[tuple[Set, int], None] = {}
        self._slopes: dict[tuple[Gates, int], list[float]] = {}

    def losses(self, sets: Sequence[Set], end: int = EXAMPLES) -> list[float]:
        """On the first so many examples; what is new is paid for."""
        for example in range(end):
            new = [one for one in sets if (one, example) not in self._seen]
            self._seen |= {(one, example): None for one in new}
            if new:
                plans = [layer_types_of(one, self.layers) for one in new]
                self.spent += _cost(tuple(plans))
        return [float(_loss(self._scored, self._gates(one))[:end].mean()) for one in sets]

    def slopes_at(self, gates: Gates, some: int = EXAMPLES) -> list[float]:
        """By differences; paid for as one gradient an example."""
        if (gates, some) not in self._slopes:
            self.spent += some * gradient_layer_forwards((FULL,) * self.layers, SPANS, MASK)
            at, step = np.array([gate for (gate,) in gates]), 1e-5
            moves = step * np.eye(self.layers)
            part: Drawn = tuple(array[:some] for array in self._scored)  # type: ignore[assignment]
            self._slopes[gates, some] = [
                float((_loss(part, at + move) - _loss(part, at - move)).mean()) / (2 * step)
                for move in moves
            ]
        return self._slopes[gates, some]

    def test_loss(self, layers: Set) -> float:
        """On examples that nothing was chosen on."""
        return float(_loss(self._test, self._gates(layers)).mean())

    def _gates(self, layers: Set) -> np.ndarray:
        return np.isin(np.arange(self.layers), list(layers)).astype(float)


def _loss(drawn: Drawn, gates: np.ndarray) -> np.ndarray:
    who, strength, needed = drawn
    found = np.where(needed, 1 - np.prod(1 - strength * gates[who], axis=2), 1)
    loss: np.ndarray = -np.log(0.02 + 0.98 * found.prod(axis=1))
    return loss


_costs: dict[tuple[tuple[str, ...], ...], float] = {}


def _cost(plans: tuple[tuple[str, ...], ...]) -> float:
    if plans not in _costs:
        _costs[plans] = layer_forwards(plans, SPANS, MASK)
    return _costs[plans]


def guided(problem: Problem, keep: int, passes: int) -> Sequence[int]:
    """As the selector does; with all layers kept, an order of them."""
    total = problem.layers
    limit = passes * total * EXAMPLES
    path = path_order(partial(problem.slopes_at, some=32), Units(total))
    begun = problem.spent

    def may_go_on(passes: float, share: float = 1.0) -> bool:
        step = passes * total * EXAMPLES
        return problem.spent + step <= begun + share * (limit - begun)

    tries = min(GRADIENT_PASSES, typical_cost(SPANS, MASK, TRIES, Units(total), keep) / total)
    oracle = Oracle(problem.slopes_at, problem.losses, EXAMPLES, may_go_on, tries)
    if keep == total:
        parts = [partial(may_go_on, share=share) for share in (1 / 2, 3 / 4, 1.0)]
        return nested_order(oracle, parts, path, Units(total))[0]
    return sorted(guided_set(oracle, frozenset(path[:keep]), frozenset(path), Units(total))[0])


def searched(problem: Problem, keep: int) -> Set:
    """Greedy, then swaps."""
    order = greedy_order(problem.losses, problem.layers, keep)
    return refine(problem.losses, frozenset(order[:keep]), problem.layers).layers


def main() -> None:
    """Print a line for each number of layers kept, and for nested orders."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[36])
    parser.add_argument("--problems", type=int, default=16)
    options = parser.parse_args()
    print(
        f"Python {platform.python_version()}, numpy {np.__version__}, {options.problems} problems"
    )
    for layers in options.layers:
        naive = EXAMPLES * layers * (layers + 1)
        for keep in (-(-layers // 8), layers // 4, layers // 2):
            asked = [Problem(layers, seed) for seed in range(options.problems)]
            best = [problem.test_loss(searched(problem, keep)) for problem in asked]
            cost = fmean(problem.spent for problem in asked) / naive
            print(f"{layers} layers, {keep} kept: search {fmean(best):.3f} nats, {cost:.2f} naive")
            for effort, passes in EFFORTS.items():
                mine = [Problem(layers, seed) for seed in range(options.problems)]
                above = [
                    problem.test_loss(frozenset(guided(problem, keep, passes))) - other
                    for problem, other in zip(mine, best, strict=True)
                ]
                costs = [problem.spent / naive for problem in mine]
                error = stdev(above) / len(above) ** 0.5
                print(
                    f"  guided, {effort}: {fmean(above):+.3f} ± {error:.3f} nats to search, "
                    f"{fmean(costs):.2f} naive, at most {max(costs):.2f}"
                )
        print(f"{layers} layers, fronts of one order: mean loss over {NESTED} kept")
        asked = [Problem(layers, seed) for seed in range(options.problems)]
        orders = [("greedy", [greedy_order(one.losses, layers, layers) for one in asked], asked)]
        for effort, passes in EFFORTS.items():
            mine = [Problem(layers, seed) for seed in range(options.problems)]
            orders.append((effort, [guided(one, layers, passes) for one in mine], mine))  # type: ignore[misc]
        for name, found, problems in orders:
            losses = [
                one.test_loss(frozenset(order[:count]))
                for one, order in zip(problems, found, strict=True)
                for count in NESTED
            ]
            cost = fmean(one.spent for one in problems) / naive
            print(f"  {name}: {fmean(losses):.3f} nats, {cost:.2f} naive")


if __name__ == "__main__":
    main()
