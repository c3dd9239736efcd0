"""Calibration examples: read or generated, tokenized, filtered, split, and every row counted."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from converter.calibration.data.facts import KINDS
from converter.calibration.data.forms import FORMS
from converter.calibration.data.recall import (
    RecallExample,
    growing_depths,
    recall_examples,
)
from converter.calibration.data.rows import (
    UNLABELLED,
    Row,
    tokenized,
    tokens_around,
    with_evidence_in_window,
)
from converter.calibration.data.settings import DataSettings
from converter.calibration.data.sources import DataSet, data_sets
from converter.common.errors import DataError
from converter.common.statistics import FEWEST
from converter.inference.example import Example
from converter.inference.tokenizer import Tokenizer
from converter.model.mask import Mask

_T = TypeVar("_T")
_TOO_LONG = "prompt longer than --length"
_WITHIN_WINDOW = "prompt within the window, where sliding changes nothing"
_ANSWER_SHORT = "answer shorter than --min-answer"
_ANSWER_LONG = "answer longer than --max-answer"
# What makes rows usable that were dropped for this reason; for any other, another form of rows.
_REMEDIES = {
    _TOO_LONG: "raise --length",
    _WITHIN_WINDOW: "give longer prompts, or lower --window",
    _ANSWER_SHORT: "lower --min-answer",
    _ANSWER_LONG: "raise --max-answer",
}
# Far from the seeds of the other splits.
_VALIDATION_SEEDS = 1 << 40


@dataclass(frozen=True)
class Examples:
    """What calibration runs on.

    Attributes:
        scored: examples that layers are scored on; those of several sets in turn.
        validation: examples on which choices of layers are held against each other.
        held_out: examples that neither was done on, for the quality report.
        asked: how many were asked for, of each of these three.
        looked_at: rows that were tried.
        dropped: how many of them were not usable, by reason, the most frequent first.
        sets: each set's own examples, where there are several.
        generated: what each scored example was made from; None for one of the user's rows.
    """

    scored: tuple[Example, ...]
    validation: tuple[Example, ...]
    held_out: tuple[Example, ...]
    asked: tuple[int, int, int] = (0, 0, 0)
    looked_at: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    sets: Mapping[str, Examples] = field(default_factory=dict)
    generated: tuple[RecallExample | None, ...] = ()

    @property
    def all(self) -> tuple[Example, ...]:
        """Every one of them."""
        return (*self.scored, *self.validation, *self.held_out)

    @property
    def remedy(self) -> str:
        """What to change so that most of the dropped rows become usable."""
        for reason in self.dropped:
            return _REMEDIES.get(reason, "give rows in a form that is read (docs/data.md)")
        return "give more data"


def fingerprint_of(examples: Sequence[Example]) -> str:
    """A hash over the examples' token ids and their labels."""
    # Kinds that are no labels follow from where the tokens come from.
    unlabelled = (UNLABELLED, *KINDS)
    ids = [[e.prompt, e.answer, *(() if e.kind in unlabelled else (e.kind,))] for e in examples]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def digest_of(example: Example) -> str:
    """A short name for an example's token ids and label."""
    return fingerprint_of([example])[:16]


def load_examples(
    tokenizer: Tokenizer, settings: DataSettings, mask: Mask, layers: int, context_tokens: int
) -> Examples:
    """Read or generate examples, keep those that can tell layers apart, and say what was dropped.

    Raises:
        DataError: a file is missing or malformed, or too few rows of a set are usable.
    """
    sets = data_sets(settings.data)
    if settings.samples < len(sets):
        raise DataError(
            "there are more data sets than examples to score",
            where="--samples",
            expected=f"at least {len(sets)}, one for each set",
            got=settings.samples,
        )
    splits = (settings.samples, settings.validation, settings.holdout)
    loaded: dict[str, Examples] = {}
    for data, *split in zip(sets, *(shares(n, len(sets)) for n in splits), strict=True):
        samples, validation, holdout = split
        own = replace(settings, samples=samples, validation=validation, holdout=holdout)
        loaded[data.name] = _load_set(tokenizer, data, own, mask, layers, context_tokens)
    parts = list(loaded.values())
    examples = Examples(
        _taking_turns([part.scored for part in parts]),
        _taking_turns([part.validation for part in parts]),
        _taking_turns([part.held_out for part in parts]),
        splits,
        sum(part.looked_at for part in parts),
        _by_count(sum((Counter(part.dropped) for part in parts), Counter())),
        loaded if len(parts) > 1 else {},
        _taking_turns([part.generated for part in parts]),
    )
    # A choice on so few would be mostly luck; who wants it asks for so few.
    if len(examples.scored) < FEWEST <= settings.samples:
        so_few = f"--samples {len(examples.scored)} --validation {len(examples.validation)}"
        raise DataError(
            "too few examples remain to choose layers on",
            where=settings.data,
            expected=f"{settings.samples} (--samples), at the least {FEWEST}",
            got=f"{len(examples.scored)}, of {_told(examples)}",
            next_step=f"{examples.remedy}; to go on all the same: {so_few}",
        )
    return examples


def _by_count(counts: Counter[str]) -> dict[str, int]:
    return dict(counts.most_common())


def _told(examples: Examples) -> str:
    dropped = "; ".join(f"{count} {reason}" for reason, count in examples.dropped.items())
    rows = f"{examples.looked_at} rows"
    return f"{rows}: dropped {dropped}" if dropped else rows


def near_examples(tokenizer: Tokenizer, examples: Examples, mask: Mask) -> dict[int, Example]:
    """Generated examples with their evidence moved into the window of the answer.

    Returns:
        Examples by the index of the scored one they were made from; none for evidence that the
        window cannot hold together with the question, or for the user's rows.
    """
    near: dict[int, Example] = {}
    for index, row in enumerate(examples.generated):
        moved = row and with_evidence_in_window(tokenizer, row, mask.window_tokens)
        if moved:
            near[index] = replace(moved, kind=examples.scored[index].kind)
    return near


def shares(total: int, sets: int) -> list[int]:
    """`total` examples shared out evenly; the first sets take what is left over."""
    return [total // sets + (index < total % sets) for index in range(sets)]


def in_turn(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """The order in which sets of these sizes take turns.

    Returns:
        An index within a set and that set's own index, for each example: any beginning holds as
        many examples of one set as of another, give or take one, until a set has no more.
    """
    return sorted((index, of) for of, size in enumerate(sizes) for index in range(size))


def _taking_turns(parts: Sequence[Sequence[_T]]) -> tuple[_T, ...]:
    return tuple(parts[of][index] for index, of in in_turn([len(part) for part in parts]))


def _load_set(
    tokenizer: Tokenizer,
    data: DataSet,
    settings: DataSettings,
    mask: Mask,
    layers: int,
    context_tokens: int,
) -> Examples:
    wanted = settings.samples + settings.validation + settings.holdout
    looked_at, dropped = 0, Counter[str]()
    rows: list[Row] = []
    kept: list[Example] = []
    for row in _rows(tokenizer, data, settings, mask, layers):
        looked_at += 1
        example = tokenized(tokenizer, row)
        if isinstance(example, Example):
            example = _why_dropped(example, settings, mask, context_tokens) or example
        if isinstance(example, str):
            dropped[example] += 1
            continue
        rows.append(row)
        kept.append(replace(example, kind=data.label or example.kind))
        if len(kept) == wanted:
            break
    # What is short is validation beyond what is scored, then the held-out set, and then all.
    as_many = settings.samples + min(settings.samples, settings.validation)
    held_out = min(settings.holdout, max(0, len(kept) - as_many))
    border = min(settings.samples + settings.validation, len(kept) - held_out)
    first = min(settings.samples, -(-border * settings.samples // as_many))
    examples = Examples(
        tuple(kept[:first]),
        tuple(kept[first:border]),
        tuple(kept[border:]),
        (settings.samples, settings.validation, settings.holdout),
        looked_at,
        _by_count(dropped),
        generated=tuple(row if isinstance(row, RecallExample) else None for row in rows[:first]),
    )
    if not first:
        raise DataError(
            "no example is usable",
            where=data,
            expected=f"rows of the form {FORMS}, with a prompt of {_shortest(mask)} to "
            f"{settings.length_tokens} tokens",
            got=_told(examples) if looked_at else "no rows",
            next_step=examples.remedy,
        )
    return examples


def _shortest(mask: Mask) -> int:
    return mask.window_tokens + mask.sink_tokens + 1


def _why_dropped(
    example: Example, settings: DataSettings, mask: Mask, context_tokens: int
) -> str | None:
    prompt, answer = len(example.prompt), len(example.answer)
    if prompt > settings.length_tokens:
        return _TOO_LONG
    if prompt + answer > context_tokens:
        return "prompt and answer longer than the model's context"
    if prompt < _shortest(mask):
        return _WITHIN_WINDOW
    if answer < settings.min_answer_tokens:
        return _ANSWER_SHORT
    if answer > settings.max_answer_tokens:
        return _ANSWER_LONG
    return None


def _rows(
    tokenizer: Tokenizer, data: DataSet, settings: DataSettings, mask: Mask, layers: int
) -> Iterator[Row]:
    """Rows in the order they are tried: generated ones as made, a file's in a seeded shuffle."""
    if not data.generated:
        rows = list(data.rows)
        random.Random(settings.seed).shuffle(rows)  # noqa: S311 - reproducible, not a secret
        yield from rows
        return
    around, text = tokens_around(tokenizer), data.text()
    # Every split has seeds of its own, so that none depends on how large another is.
    for samples, seed in (
        (settings.samples, 2 * settings.seed),
        (settings.validation, _VALIDATION_SEEDS + settings.seed),
        (settings.holdout, 2 * settings.seed + 1),
    ):
        yield from recall_examples(
            lambda text: len(tokenizer.encode(text, add_special_tokens=False)),
            samples=samples,
            length_tokens=settings.length_tokens - around,
            reach_tokens=layers * mask.window_tokens + mask.sink_tokens,
            seed=seed,
            text=text,
            depths=growing_depths(samples, seed),
        )
