"""How quality against budget looks on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from converter.cli.console import Console
from converter.common.units import human_bytes

if TYPE_CHECKING:
    from converter.calibration.curve import Curve, Point

_ON_FRONT = "●"


def show_curve(console: Console, curve: Curve) -> None:
    """Every chosen plan by number of full layers, beside the evenly spaced ones of that number."""
    periodic = curve.periodic()
    chosen = [point for point in curve.points if not point.is_periodic]
    # A number that only evenly spaced plans were measured for still has its row.
    chosen += [group[0] for count, group in periodic.items() if count not in _counts(chosen)]
    console.print(
        f"measured on {curve.examples} examples (NLL in nats per answer token, ± standard error; "
        f"95% intervals), KV cache at {curve.context_tokens:,} tokens"
    )
    console.table(
        (
            *("full layers", "chosen by", "KV cache", "of the original", "above the original"),
            *("answers right", "front", "evenly spaced, best", "evenly spaced, worst"),
        ),
        [
            (
                point.count,
                point.name,
                human_bytes(point.kv_bytes),
                f"{point.kv_share:.0%}",
                "" if point is curve.original else point.loss,
                point.right,
                _ON_FRONT if point.on_front else "",
                *_beside(periodic.get(point.count, ())),
            )
            for point in sorted(chosen, key=lambda point: point.count)
        ],
    )
    console.print(
        f"{_ON_FRONT} on the front: any other plan with as few full layers loses more, by its mean"
    )


def _counts(points: list[Point]) -> set[int]:
    return {point.count for point in points}


def _beside(group: tuple[Point, ...]) -> tuple[str, str]:
    """The losses of the best and the worst offset; no texts where there are none."""
    if not group:
        return "", ""
    best, worst = group[0], group[-1]
    return f"{best.loss}{' ' + _ON_FRONT if best.on_front else ''}", str(worst.loss)
