"""What an evaluation found, before anything is averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converter.evaluation.models import Variant
from converter.evaluation.tasks.item import Item
from converter.model.mask import Mask


@dataclass(frozen=True)
class Answers:
    """One variant's answers; every tuple has one entry for each item.

    Attributes:
        texts: what was generated, or the chosen option.
        scores: 0 to 1.
        nll: mean loss on the reference's tokens, nats per token.
        kl: mean Kullback-Leibler divergence from the original on them, nats per token.
        agreement: share of them where the most likely token is the original's.
        lost, won: how many of them only the original, or only this variant, has right.
    """

    texts: tuple[str, ...]
    scores: tuple[float, ...]
    nll: tuple[float, ...]
    kl: tuple[float, ...]
    agreement: tuple[float, ...]
    lost: tuple[int, ...]
    won: tuple[int, ...]


@dataclass(frozen=True)
class Language:
    """One variant on chunks of text: as in `Answers`, one entry for each chunk."""

    nll: tuple[float, ...]
    kl: tuple[float, ...]
    agreement: tuple[float, ...]


@dataclass(frozen=True)
class Speed:
    """Each run's seconds for one prompt until its last logits, and for one generated token."""

    prefill_seconds: tuple[float, ...]
    decode_seconds: tuple[float, ...]


@dataclass(frozen=True)
class Evaluation:
    """Everything measured, by variant name; empty where it was not asked for.

    Attributes:
        mask: what sliding layers see; None for a model that was not converted.
        variants: what was compared, the original first.
        text_tokens: tokens of one chunk of text; 0 without a text.
        regression: what `short_context` found.
        speed_tokens: prompt length that speed was measured at.
        harness: lm-eval's results by task and variant name.
        dropped: rows left out, by reason.
    """

    model: str
    mask: Mask | None
    variants: tuple[Variant, ...]
    items: tuple[Item, ...]
    answers: Mapping[str, Answers]
    text_tokens: int
    language: Mapping[str, Language]
    regression: Mapping[str, float]
    cost: Mapping[str, Any]
    speed: Mapping[str, Speed]
    speed_tokens: int
    harness: Mapping[str, Any]
    dropped: Mapping[str, int]
    provenance: Mapping[str, Any]

    @property
    def tasks(self) -> dict[str, list[int]]:
        """Indices of each task's items, in the order asked."""
        tasks: dict[str, list[int]] = {}
        for i, item in enumerate(self.items):
            tasks.setdefault(item.task, []).append(i)
        return tasks

    def scores(self, variant: str, indices: Sequence[int]) -> list[float]:
        """Scores of some items."""
        scores = self.answers[variant].scores
        return [scores[i] for i in indices]
