"""What `compare_selectors.py` measured, read from its JSON, and the numbers that follow from it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any

from converter.common.statistics import Estimate, Share, estimate, paired_difference, share

# Standard errors to each side of a mean that hold 95% of a normal distribution.
NORMAL_95 = NormalDist().inv_cdf(0.975)
_UNIFORM = ("original", "all sliding")
_ONE_OF_ALL = "plan "


@dataclass(frozen=True)
class Run:
    """A plan that has a name, on the test examples.

    Attributes:
        name: the selector or baseline that chose it.
        layers: its full-attention layers.
        loss: mean answer NLL, nats per token.
        above: paired difference of answer NLL to the original's.
        losses, correct: answer NLL, and whether all of it is right, of each example.
        layer_forwards: what the choice cost; None for one that was made without the model.
    """

    name: str
    layers: tuple[int, ...]
    loss: float
    above: Estimate
    losses: tuple[float, ...]
    correct: tuple[int, ...]
    layer_forwards: float | None

    @property
    def right(self) -> Share:
        """Share of answers right, with its 95% interval."""
        return share(sum(self.correct), len(self.correct))

    @property
    def way(self) -> str:
        """The way it was chosen: offsets are one, and so are seeds."""
        return self.name.split(", ")[0]

    def loss_above(self, other: Run) -> Estimate:
        """Paired difference of answer NLL to another plan's, nats per token."""
        return estimate([a - b for a, b in zip(self.losses, other.losses, strict=True)])


@dataclass(frozen=True)
class Score:
    """One way of choosing at one budget of one model.

    Attributes:
        above: answer NLL above the original's, nats per token.
        lost: accuracy lost against the original's.
        closed: how much of the gap between all sliding (0) and the original (1) is closed.
        cost: layer-forwards as a share of naive restore-one; None for a choice without the model.
    """

    above: float
    lost: float
    closed: float
    cost: float | None


@dataclass(frozen=True)
class EveryPlan:
    """The loss of every plan of a budget, by its layers: nats per answer token."""

    losses: Mapping[tuple[int, ...], float]

    @property
    def best(self) -> tuple[int, ...]:
        """The layers of the plan with the smallest loss."""
        return min(self.losses, key=lambda layers: self.losses[layers])

    @property
    def mean_distance(self) -> float:
        """How far a plan drawn at random is above the best one."""
        return fmean(map(self.distance, self.losses))

    def distance(self, layers: tuple[int, ...]) -> float:
        """How far a plan's loss is above the best one's."""
        return self.losses[layers] - self.losses[self.best]

    def rank(self, layers: tuple[int, ...]) -> int:
        """A plan's place by loss, 1 for the best."""
        return 1 + sum(loss < self.losses[layers] for loss in self.losses.values())


@dataclass(frozen=True)
class Budget:
    """What was run at one budget of one model.

    Attributes:
        name: the share of layers that keep full attention, such as `1/4`.
        keep: so many layers.
        naive: layer-forwards of naive restore-one.
        runs: the plans that have a name, the original and all sliding among them.
        every: every plan there is; None where not all were run.
    """

    name: str
    keep: int
    naive: float
    runs: tuple[Run, ...]
    every: EveryPlan | None

    def run(self, name: str) -> Run:
        """The plan of that name."""
        return next(run for run in self.runs if run.name == name)

    @property
    def original(self) -> Run:
        """The model as it was."""
        return self.run("original")

    @property
    def gap(self) -> float:
        """What sliding in every layer adds to the original's loss."""
        return self.run("all sliding").above.mean

    @property
    def choices(self) -> list[Run]:
        """Every plan that was chosen somehow: neither the original nor all sliding."""
        return [run for run in self.runs if run.name not in _UNIFORM]

    @property
    def selectors(self) -> list[Run]:
        """Plans that were chosen by running the model."""
        return [run for run in self.runs if run.layer_forwards is not None]

    @property
    def periodic(self) -> list[Run]:
        """The evenly spaced plan at every offset."""
        return [run for run in self.runs if run.name.startswith("periodic, ")]

    @property
    def best_periodic(self) -> Run:
        """The evenly spaced plan with the smallest loss on these examples."""
        return min(self.periodic, key=lambda run: run.loss)

    def scores(self) -> dict[str, Score]:
        """Every way of choosing: seeds and offsets are drawn together."""
        seeds = [run for run in self.runs if run.name.startswith("random, ")]
        offsets = self.periodic
        alone = [run for run in self.choices if run not in seeds and run not in offsets]
        found = {run.name: self._score([run]) for run in alone}
        return found | {
            **({"random, mean of seeds": self._score(seeds)} if seeds else {}),
            "periodic, best offset": self._score([self.best_periodic]),
            "periodic, mean of offsets": self._score(offsets),
            "periodic, worst offset": self._score([max(offsets, key=lambda run: run.loss)]),
        }

    def _score(self, runs: Sequence[Run]) -> Score:
        above = fmean(run.above.mean for run in runs)
        lost = self.original.right.accuracy - fmean(run.right.accuracy for run in runs)
        return Score(above, lost, 1 - above / self.gap, self.cost(runs[0]))

    def cost(self, run: Run) -> float | None:
        """A choice's layer-forwards as a share of naive restore-one; None without the model."""
        return None if run.layer_forwards is None else run.layer_forwards / self.naive


@dataclass(frozen=True)
class Model:
    """A model with its budgets, by name."""

    name: str
    layers: int
    budgets: Mapping[str, Budget]


@dataclass(frozen=True)
class SeedChoice:
    """What a selector chose on one draw of calibration examples.

    Attributes:
        model, budget, way: which choice it is.
        seed: of the draw.
        layers: its full-attention layers.
        above: answer NLL above the original's on the test examples, nats per token.
    """

    model: str
    budget: str
    way: str
    seed: str
    layers: tuple[int, ...]
    above: float


@dataclass(frozen=True)
class Results:
    """All that was measured, and how.

    Attributes:
        settings, versions: how.
        models: on the first draw of calibration examples.
        choices: of the selectors on every draw.
    """

    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    models: tuple[Model, ...]
    choices: tuple[SeedChoice, ...]

    @property
    def budgets(self) -> list[tuple[Model, Budget]]:
        """Each budget of each model."""
        return [(model, budget) for model in self.models for budget in model.budgets.values()]

    def ways(self) -> list[str]:
        """Ways of choosing, the smallest mean loss first; of equal ones the cheapest."""
        scores = [budget.scores() for _, budget in self.budgets]

        def place(way: str) -> tuple[float, float]:
            cells = [found[way] for found in scores]
            above = fmean(cell.above for cell in cells)
            # Means of the same numbers may differ in their last digits.
            return round(above, 6), fmean(cell.cost or 0.0 for cell in cells)

        return sorted(scores[0], key=place)


@dataclass(frozen=True)
class Advantage:
    """How much better one plan does than others on the same examples, with its 95% interval."""

    mean: float
    low: float
    high: float

    def turned(self) -> Advantage:
        """The others' advantage over it."""
        return Advantage(-self.mean, -self.high, -self.low)


def loss_advantage(run: Run, others: Sequence[Run]) -> Advantage:
    """Mean loss of the others less the run's, example by example, nats; normal interval."""
    mean_losses = _example_means([other.losses for other in others])
    found = estimate([b - a for a, b in zip(run.losses, mean_losses, strict=True)])
    reach = NORMAL_95 * (math.inf if found.stderr is None else found.stderr)
    return Advantage(found.mean, found.mean - reach, found.mean + reach)


def accuracy_advantage(run: Run, others: Sequence[Run]) -> Advantage:
    """The run's accuracy less the others' mean, example by example; interval from two shares."""
    found = paired_difference(run.correct, _example_means([other.correct for other in others]))
    return Advantage(found.mean, found.low, found.high)


def _example_means(values: Sequence[Sequence[float]]) -> list[float]:
    return [fmean(of_example) for of_example in zip(*values, strict=True)]


def load(path: Path) -> Results:
    """Read what `compare_selectors.py` wrote."""
    data = json.loads(path.read_text())
    models = tuple(_model(name, found) for name, found in data["models"].items())
    return Results(data["settings"], data["versions"], models, tuple(_choices(data)))


def _choices(data: Mapping[str, Any]) -> Iterator[SeedChoice]:
    first = str(data["settings"]["seeds"][0])
    drawn_anew = {name: one for name, one in data["models"].items() if one["other_seeds"]}
    for name, model in drawn_anew.items():
        draws = {first: {b: found["plans"] for b, found in model["budgets"].items()}}
        draws |= model["other_seeds"]
        for budget, plans in draws[first].items():
            ways = {plan["name"] for plan in plans if plan["layer_forwards"] is not None}
            for others in model["other_seeds"].values():
                ways &= {plan["name"] for plan in others[budget]}
            for seed, chosen in draws.items():
                for plan in chosen[budget]:
                    if plan["name"] in ways:
                        layers = tuple(plan["layers"])
                        yield SeedChoice(
                            name, budget, plan["name"], seed, layers, plan["nll_above"]
                        )


def _model(name: str, data: Mapping[str, Any]) -> Model:
    layers, naive = data["layers"], data["naive_layer_forwards"]
    budgets = {
        budget: _budget(budget, found, layers, naive) for budget, found in data["budgets"].items()
    }
    return Model(name, layers, budgets)


def _budget(name: str, data: Mapping[str, Any], layers: int, naive: float) -> Budget:
    runs, every = [], {}
    for plan in data["plans"]:
        if plan["name"].startswith(_ONE_OF_ALL):
            every[tuple(plan["layers"])] = plan["nll"]
        else:
            runs.append(_run(plan))
    complete = len(every) == math.comb(layers, data["keep"])
    return Budget(name, data["keep"], naive, tuple(runs), EveryPlan(every) if complete else None)


def _run(plan: Mapping[str, Any]) -> Run:
    return Run(
        plan["name"],
        tuple(plan["layers"]),
        plan["nll"],
        Estimate(plan["nll_above"], plan["nll_above_stderr"]),
        tuple(plan["per_example"]),
        tuple(plan["correct"]),
        plan["layer_forwards"],
    )
