"""Scoring of generated answers, as RULER defines it (arXiv 2404.06654).

A prediction's score is the share of its references that occur in it, compared without case: all of
them count (`match_all`), or the best one does (`match_part`, RULER's rule for question answering).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

_CONTROL = re.compile(r"[\x00-\x1f]")


def cleaned(prediction: str) -> str:
    """A prediction without outer white space, control characters made line ends."""
    return _CONTROL.sub("\n", prediction.strip()).strip()


def match_all(prediction: str, references: Sequence[str]) -> float:
    """Share of the references found in the prediction."""
    return sum(map(_finder(prediction), references)) / len(references)


def match_part(prediction: str, references: Sequence[str]) -> float:
    """1 when any reference is found in the prediction, else 0."""
    return float(any(map(_finder(prediction), references)))


def _finder(prediction: str) -> Callable[[str], bool]:
    folded = prediction.lower()
    return lambda reference: reference.lower() in folded


RULES: Mapping[str, Callable[[str, Sequence[str]], float]] = MappingProxyType(
    {"all": match_all, "part": match_part}
)
