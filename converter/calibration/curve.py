"""Quality against budget: what every number of full layers costs in loss, and saves in memory."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from converter.calibration.comparison import (
    QUALITY,
    Candidate,
    check_held_out,
    evaluate_plans,
    periodic_candidates,
)
from converter.calibration.results import PLAN_KEYS, Outcome, Quality, is_periodic_name
from converter.calibration.run import CalibrationRun
from converter.calibration.scores import Scores
from converter.common.errors import ScoresError
from converter.common.files import read_json_object
from converter.common.progress import Progress
from converter.common.statistics import FEWEST, Estimate, Share
from converter.model.dimensions import ModelDimensions
from converter.model.mask import Mask
from converter.plan.plan import Plan, cache_bytes
from converter.plan.units import Units

# Nats per answer token above the original that a recommended plan may lose.
LITTLE_LOSS = 0.05
# More than any model loses, and more ways of choosing than there are, with every offset.
_MOST_NATS = 1e6
_MOST_NAMES = 1000


@dataclass(frozen=True)
class Point:
    """One measured plan.

    Attributes:
        name: how its layers were chosen.
        full, kv_heads: as an `Outcome` has them.
        kv_bytes: cache of one sequence of the curve's context.
        kv_share: of the original's.
        loss: answer NLL above the original on the same examples, in nats per token.
        right: answers that greedy decoding gets right.
        is_periodic: whether its layers are evenly spaced, chosen without measuring.
        on_front: no other measured plan does with as few full layers and as low a mean loss, and
            with less of one of them (the Pareto front). Layers are counted, not bytes, as sliding
            saves work even where it frees no cache.
    """

    name: str
    full: tuple[int, ...]
    kv_bytes: int
    kv_share: float
    loss: Estimate
    right: Share
    is_periodic: bool
    on_front: bool
    kv_heads: int = 1

    @property
    def count(self) -> int:
        """How many layers, or KV heads, keep full attention."""
        return len(self.full)

    @classmethod
    def from_json(cls, value: Mapping[str, Any], kv_heads: int) -> Point:
        """Read what `to_json` gave; raise KeyError, TypeError or ValueError for anything else."""
        loss, right, name = value["nll_above_original"], value["answers_right"], value["name"]
        stderr = loss["stderr"]
        # It is printed, and a terminal obeys what no name has.
        if not isinstance(name, str) or re.fullmatch(r"[\w, -]{1,80}", name) is None:
            raise ValueError(f"no name of a plan: {name!r}")
        return cls(
            name=name,
            full=tuple(map(int, value[PLAN_KEYS[kv_heads > 1]])),
            kv_heads=kv_heads,
            kv_bytes=_whole(value["kv_bytes"]),
            kv_share=_share(value["kv_share"]),
            loss=Estimate(_nats(loss["mean"]), None if stderr is None else abs(_nats(stderr))),
            right=Share(
                _share(right["accuracy"]),
                _share(right["low"]),
                _share(right["high"]),
                _whole(right["n"]),
            ),
            is_periodic=is_periodic_name(name),
            on_front=bool(value["on_front"]),
        )

    def to_json(self) -> dict[str, Any]:
        """The numbers, by the names that other results give them."""
        return {
            "name": self.name,
            "full_layers": self.count,
            PLAN_KEYS[self.kv_heads > 1]: list(self.full),
            "kv_bytes": self.kv_bytes,
            "kv_share": self.kv_share,
            "nll_above_original": asdict(self.loss),
            "answers_right": asdict(self.right),
            "on_front": self.on_front,
        }


@dataclass(frozen=True)
class Advice:
    """A plan that is recommended, and why; or why none is."""

    point: Point | None
    reason: str


@dataclass(frozen=True)
class Curve:
    """Every measured plan of a model under one mask, on the same examples.

    Attributes:
        units: what plans decided.
        context_tokens: the sequence that the cache is counted for.
        points: by number of full units, as they were given; the last one is the original.
    """

    units: Units
    context_tokens: int
    examples: int
    points: tuple[Point, ...]

    @property
    def original(self) -> Point:
        """The model as it was."""
        return self.points[-1]

    @property
    def ends(self) -> tuple[Point, ...]:
        """What no choice changes: every layer sliding, if that was measured, and the original."""
        return tuple(point for point in self.points if point.count in (0, self.units.total))

    def choices(self) -> dict[str, tuple[Point, ...]]:
        """The points between the ends by how their layers were chosen, fewest full layers first."""
        found: dict[str, tuple[Point, ...]] = {}
        for point in self.points:
            if 0 < point.count < self.units.total and not point.is_periodic:
                found[point.name] = (*found.get(point.name, ()), point)
        return found

    def periodic(self) -> dict[int, tuple[Point, ...]]:
        """Evenly spaced plans by number of full layers, the best offset first."""
        found: dict[int, tuple[Point, ...]] = {}
        for point in sorted(self.points, key=lambda point: (point.count, point.loss.mean)):
            if point.is_periodic:
                found[point.count] = (*found.get(point.count, ()), point)
        return found

    @property
    def advice(self) -> Advice:
        """How many layers to keep: the fewest, by any one way of choosing, that lose little."""
        if self.examples < FEWEST:
            return Advice(
                None,
                f"On {self.examples} examples no number of full {self.units} is recommended; "
                f"ask for {FEWEST} or more with --holdout.",
            )
        if not self.original.right.accuracy:
            return Advice(
                None, "The original answers no example right, so nothing is recommended on them."
            )
        sliding = self.ends[0]
        if sliding.count == 0 and sliding.loss.mean <= LITTLE_LOSS:
            return Advice(
                None,
                f"With every layer sliding these examples lose {sliding.loss}, so they do not say "
                "how many to keep.",
            )
        enough = [
            (point.count, name, [sliding, *points].index(point))
            for name, points in self.choices().items()
            for point in points
            if point.loss.mean <= LITTLE_LOSS
        ]
        if not enough:
            return Advice(
                None,
                f"No number of full {self.units} below all {self.units.total} loses less than "
                f"{LITTLE_LOSS} nats per answer token: take as much loss as you can bear.",
            )
        count, name, place = min(enough)
        fewer, point = ([sliding, *self.choices()[name]][i] for i in (place - 1, place))
        sure = (
            f"clearly below {LITTLE_LOSS}"
            if point.loss.high < LITTLE_LOSS
            else f"which {self.examples} examples do not tell from {LITTLE_LOSS}"
        )
        doubt = "" if fewer.loss.low > LITTLE_LOSS else ", which may be no more"
        return Advice(
            point,
            f"Recommended: {count} full {self.units}. {count} of {self.units.total} lose "
            f"{point.loss} nats per answer token, {sure}; {fewer.count} lose {fewer.loss}{doubt}.",
        )

    def to_json(self) -> dict[str, Any]:
        """The curve as it is saved."""
        advice = self.advice
        return {
            "layers": self.units.layers,
            **({"kv_heads": self.units.per_layer} if self.units.of_heads else {}),
            "context_tokens": self.context_tokens,
            "examples": self.examples,
            "recommended": {
                "full_layers": None if advice.point is None else advice.point.count,
                "reason": advice.reason,
            },
            "points": [point.to_json() for point in self.points],
            "periodic": [
                {
                    "full_layers": count,
                    "offsets": len(points),
                    "best": points[0].to_json(),
                    "worst": points[-1].to_json(),
                }
                for count, points in self.periodic().items()
            ],
        }


def _within(value: Any, low: float, high: float) -> Any:
    if type(value) not in (int, float) or not low <= value <= high:
        raise ValueError(f"not a number from {low:g} to {high:g}: {value!r}")
    return value


def _share(value: Any) -> float:
    return float(_within(value, 0, 1))


def _nats(value: Any) -> float:
    return float(_within(value, -_MOST_NATS, _MOST_NATS))


def _whole(value: Any) -> int:
    return int(_within(value, 0, 1 << 60))


def load_curve(path: Path) -> Curve:
    """Read a saved curve.

    Raises:
        ScoresError: the file is missing or is not a curve.
    """
    value = read_json_object(path, ScoresError, "measure one with: hybridize plan SOURCE --pareto")
    try:
        layers, tokens, examples = (
            _whole(value[name]) for name in ("layers", "context_tokens", "examples")
        )
        units = Units(layers, max(1, _whole(value.get("kv_heads", 1))))
        points = tuple(Point.from_json(point, units.per_layer) for point in value["points"])
        if len({point.name for point in points}) > _MOST_NAMES:
            raise ValueError(f"more than {_MOST_NAMES} ways of choosing")
        curve = Curve(units, tokens, examples, points)
        if not points or curve.original.count != units.total:
            raise ValueError("the last plan is not the original")
        candidates = set(curve.original.full)
        if any(not candidates.issuperset(point.full) for point in points):
            raise ValueError(f"a plan of other than {units.total} {units}")
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ScoresError("this is not a saved curve", where=path, got=error) from error
    return curve


def curve_with(path: Path, plan: Plan) -> Curve | None:
    """A saved curve, where there is one and the plan was measured for it.

    Raises:
        ScoresError: the file is not a curve.
    """
    curve = load_curve(path) if path.is_file() else None
    if curve is None or plan.is_mixed > curve.units.of_heads:
        return None
    measured = (point.full for point in curve.points)
    return curve if plan.units_in_full(curve.units) in measured else None


def measure_curve(
    run: CalibrationRun,
    orders: Mapping[str, Sequence[int]],
    context_tokens: int,
    progress: Progress,
) -> Curve:
    """Run the front of each order, and the periodic plans, on the held-out examples.

    Args:
        orders: every unit, the one to keep first, by what made the order.
        context_tokens: the sequence that the cache is counted for.

    Raises:
        DataError: there are no held-out examples.
    """
    held_out = run.examples.held_out
    check_held_out(held_out)
    candidates = [Candidate("original", run.numbers), Candidate("all sliding", ())]
    for count in _counts(run.units):
        candidates += [Candidate(name, tuple(order[:count])) for name, order in orders.items()]
        candidates += periodic_candidates(run, count)
    original, *others = evaluate_plans(run, held_out, QUALITY, candidates, progress)
    return build_curve(original, others, run.source.shape, run.mask, context_tokens)


def _counts(units: Units) -> range:
    """The numbers of full units between the ends that a curve shows: whole layers' worth."""
    return range(units.per_layer, units.total, units.per_layer)


def measure_choice(
    run: CalibrationRun, plan: Plan, scores: Scores, progress: Progress
) -> tuple[Quality, Curve]:
    """Run a chosen plan on the held-out examples, beside what it must beat and its alternatives.

    It must beat all layers sliding, and the periodic plans of as many full layers. Its alternatives
    are the other numbers of layers, from the front of the order that it was taken from; the curve's
    cache is counted for the model's own context.

    Raises:
        DataError: there are no held-out examples, or the loss is not a finite number.
    """
    held_out = run.examples.held_out
    check_held_out(held_out)
    kept = plan.units_in_full(run.units)
    beside = [
        Candidate("original", run.numbers),
        Candidate("hybrid", kept),
        Candidate("all sliding", ()),
        *periodic_candidates(run, len(kept)),
    ]
    fronts = [Candidate(scores.method, scores.order[:count]) for count in _counts(run.units)]
    found = evaluate_plans(run, held_out, QUALITY, [*beside, *fronts], progress)
    original, hybrid, *others = found[: len(beside)]
    shape = run.source.shape
    curve = build_curve(original, found[2:], shape, run.mask, shape.context_tokens)
    asked = run.examples.asked[2]
    return Quality(original, hybrid, tuple(others), asked), curve


def build_curve(
    original: Outcome,
    candidates: Sequence[Outcome],
    shape: ModelDimensions,
    mask: Mask,
    context_tokens: int,
) -> Curve:
    """Put measured plans in order of what they cost.

    Args:
        original: everything full.
        candidates: plans measured on the same examples, of any numbers of full units. One that
            keeps every one is the original, and left out.
        context_tokens: the sequence that the cache is counted for.

    Raises:
        ValueError: an outcome is of another number of examples.
    """
    if any(len(plan.nll) != len(original.nll) for plan in candidates):
        raise ValueError("a plan was measured on another number of examples than the original")
    units = Units(len(shape.full_layers), original.kv_heads)
    whole = cache_bytes(units.layers, mask, shape, context_tokens)
    plans = [plan for plan in candidates if len(plan.full) < units.total]
    plans = sorted([*plans, original], key=lambda plan: len(plan.full))
    costs = [(len(plan.full), plan.loss_above(original).mean) for plan in plans]
    points = []
    for plan, cost in zip(plans, costs, strict=True):
        layers = Fraction(cost[0], units.per_layer)
        size = cache_bytes(layers, mask, shape, context_tokens)
        points.append(
            Point(
                name=plan.name,
                full=tuple(sorted(plan.full)),
                kv_heads=units.per_layer,
                kv_bytes=size,
                kv_share=size / whole,
                loss=plan.loss_above(original),
                right=plan.accuracy,
                is_periodic=plan.offset is not None,
                on_front=not any(
                    count <= cost[0] and mean <= cost[1] and (count, mean) != cost
                    for count, mean in costs
                ),
            )
        )
    return Curve(units, context_tokens, len(original.nll), tuple(points))
