"""Choices that look at nothing but the number of layers: what measuring has to beat."""

from __future__ import annotations

import random

from converter.calibration.selectors.base import Baseline


def _random(total: int, count: int, seed: int) -> tuple[int, ...]:
    return tuple(sorted(random.Random(seed).sample(range(total), count)))  # noqa: S311


def _one(_total: int, _count: int) -> int:
    return 1


FIRST = Baseline("first", "the first layers", lambda _, count, __: tuple(range(count)), _one)
LAST = Baseline(
    "last", "the last layers", lambda total, count, _: tuple(range(total - count, total)), _one
)
MIDDLE = Baseline(
    "middle",
    "the layers in the middle",
    lambda total, count, _: tuple(range((total - count) // 2, (total - count) // 2 + count)),
    _one,
)
RANDOM = Baseline("random", "layers drawn by --seed", _random, None)
