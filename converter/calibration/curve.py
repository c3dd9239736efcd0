"""Quality against budget: what every number of full layers costs in loss, and saves in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from converter.calibration.comparison import (
    QUALITY,
    Candidate,
    check_held_out,
    evaluate_plans,
    periodic_candidates,
)
from converter.calibration.results import Outcome
from converter.calibration.run import CalibrationRun
from converter.common.progress import Progress
from converter.common.statistics import Estimate, Share
from converter.model.dimensions import ModelDimensions
from converter.model.mask import Mask
from converter.plan.plan import cache_bytes


@dataclass(frozen=True)
class Point:
    """One measured plan.

    Attributes:
        name: how its layers were chosen.
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
    full_attention_layers: tuple[int, ...]
    kv_bytes: int
    kv_share: float
    loss: Estimate
    right: Share
    is_periodic: bool
    on_front: bool

    @property
    def count(self) -> int:
        """How many layers keep full attention."""
        return len(self.full_attention_layers)

    def to_json(self) -> dict[str, Any]:
        """The numbers, by the names that other results give them."""
        return {
            "name": self.name,
            "full_layers": self.count,
            "full_attention_layers": list(self.full_attention_layers),
            "kv_bytes": self.kv_bytes,
            "kv_share": self.kv_share,
            "nll_above_original": asdict(self.loss),
            "answers_right": asdict(self.right),
            "on_front": self.on_front,
        }


@dataclass(frozen=True)
class Curve:
    """Every measured plan of a model under one mask, on the same examples.

    Attributes:
        context_tokens: the sequence that the cache is counted for.
        points: by number of full layers, as they were given; the last one is the original.
    """

    layers: int
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
        return tuple(point for point in self.points if point.count in (0, self.layers))

    def choices(self) -> dict[str, tuple[Point, ...]]:
        """The points between the ends by how their layers were chosen, fewest full layers first."""
        found: dict[str, tuple[Point, ...]] = {}
        for point in self.points:
            if 0 < point.count < self.layers and not point.is_periodic:
                found[point.name] = (*found.get(point.name, ()), point)
        return found

    def periodic(self) -> dict[int, tuple[Point, ...]]:
        """Evenly spaced plans by number of full layers, the best offset first."""
        found: dict[int, tuple[Point, ...]] = {}
        for point in sorted(self.points, key=lambda point: (point.count, point.loss.mean)):
            if point.is_periodic:
                found[point.count] = (*found.get(point.count, ()), point)
        return found

    def to_json(self) -> dict[str, Any]:
        """The curve as it is saved."""
        return {
            "layers": self.layers,
            "context_tokens": self.context_tokens,
            "examples": self.examples,
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


def measure_curve(
    run: CalibrationRun,
    orders: Mapping[str, Sequence[int]],
    context_tokens: int,
    progress: Progress,
) -> Curve:
    """Run the front of each order, and the periodic plans, on the held-out examples.

    Args:
        orders: every layer, the one to keep first, by what made the order.
        context_tokens: the sequence that the cache is counted for.

    Raises:
        DataError: there are no held-out examples.
    """
    held_out = run.examples.held_out
    check_held_out(held_out)
    total = run.source.shape.layers
    candidates = [Candidate("original", tuple(range(total))), Candidate("all sliding", ())]
    for count in range(1, total):
        candidates += [Candidate(name, tuple(order[:count])) for name, order in orders.items()]
        candidates += periodic_candidates(total, count)
    original, *others = evaluate_plans(run, held_out, QUALITY, candidates, progress)
    return build_curve(original, others, run.source.shape, run.mask, context_tokens)


def build_curve(
    original: Outcome,
    candidates: Sequence[Outcome],
    shape: ModelDimensions,
    mask: Mask,
    context_tokens: int,
) -> Curve:
    """Put measured plans in order of what they cost.

    Args:
        original: all layers full.
        candidates: plans measured on the same examples, of any numbers of full layers. One that
            keeps every layer is the original, and left out.
        context_tokens: the sequence that the cache is counted for.

    Raises:
        ValueError: an outcome is of another number of examples.
    """
    whole = cache_bytes(shape.layers, mask, shape, context_tokens)
    plans = [plan for plan in candidates if len(plan.full_attention_layers) < shape.layers]
    plans = sorted([*plans, original], key=lambda plan: len(plan.full_attention_layers))
    costs = [(len(p.full_attention_layers), p.loss_above(original).mean) for p in plans]
    points = []
    for plan, cost in zip(plans, costs, strict=True):
        size = cache_bytes(cost[0], mask, shape, context_tokens)
        points.append(
            Point(
                name=plan.name,
                full_attention_layers=tuple(sorted(plan.full_attention_layers)),
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
    return Curve(shape.layers, context_tokens, len(original.nll), tuple(points))
