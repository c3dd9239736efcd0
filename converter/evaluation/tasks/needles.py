"""RULER's needle tasks (arXiv 2404.06654): sentences with magic values, hidden in a haystack.

Needles, parameters, haystacks and depths are the published ones; the wording of the request is
ours, and essays are the user's text or plain sentences made here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from converter.evaluation.tasks.item import Draft, ItemSpec, Task
from converter.evaluation.tasks.lexicon import compounds, random_uuid

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
# Forty depths in whole percent, as published: evenly spaced, rounded to even.
DEPTHS: tuple[int, ...] = tuple(round(100 * i / 39) for i in range(40))
# Words of a haystack that can hold a needle; noise counts sentences and needles count needles.
_LEAST = {"noise": len(NOISE), "essay": 12, "needles": 1}


@dataclass(frozen=True)
class Needles:
    """The published parameters of one needle task.

    Attributes:
        haystack: `noise`, one line over and over; `essay`; or `needles`, made of other needles.
        key, value: what they are: `words` or `uuids`, and `numbers` or `uuids`.
        keys: needles with other keys, the asked one included.
        values: values for each key.
        queries: keys asked for at once.
    """

    haystack: str
    key: str
    value: str
    keys: int = 1
    values: int = 1
    queries: int = 1

    @property
    def needles(self) -> int:
        """How many needles are hidden."""
        return max(self.keys, self.queries) * self.values

    @property
    def has_one_answer(self) -> bool:
        """Whether a single value of a single key is asked for."""
        return self.queries * self.values == 1


RULER_NEEDLES: dict[str, Needles] = {
    "niah_single_1": Needles("noise", "words", "numbers"),
    "niah_single_2": Needles("essay", "words", "numbers"),
    "niah_single_3": Needles("essay", "words", "uuids"),
    "niah_multikey_1": Needles("essay", "words", "numbers", keys=4),
    "niah_multikey_2": Needles("needles", "words", "numbers"),
    "niah_multikey_3": Needles("needles", "uuids", "uuids"),
    "niah_multivalue": Needles("essay", "words", "numbers", values=4),
    "niah_multiquery": Needles("essay", "words", "numbers", queries=4),
}
_DRAWS: dict[str, Callable[[random.Random], str]] = {
    # Seven digits.
    "numbers": lambda rng: str(rng.randint(10**6, 10**7 - 1)),
    "words": lambda rng: rng.choice(compounds()),
    "uuids": random_uuid,
}


def needle_draft(needles: Needles, spec: ItemSpec, units: int, haystack: Sequence[str]) -> Draft:
    """A needle question; a single needle asked for is at the item's depth, others at random."""
    rng = spec.rng()
    drawn: dict[str, None] = {}
    while len(drawn) < max(needles.keys, needles.queries):
        drawn[_DRAWS[needles.key](rng)] = None
    keys = list(drawn)
    values = {key: [_DRAWS[needles.value](rng) for _ in range(needles.values)] for key in keys}
    asked = rng.sample(keys, needles.queries)
    hidden = [
        (key, NEEDLE.format(kind=needles.value, key=key, value=value))
        for key in keys
        for value in values[key]
    ]
    depths = [depth / 100 for depth in rng.sample(DEPTHS, len(hidden))]
    placed = sorted(
        (spec.depth if needles.has_one_answer and key in asked else depth, sentence)
        for (key, sentence), depth in zip(hidden, depths, strict=True)
    )
    # Another generator, so that a larger haystack draws the same question.
    others = random.Random(rng.random())  # noqa: S311 (reproducible on purpose)
    if needles.haystack == "essay":
        parts, joint = _essay_words(others, units, haystack), " "
    elif needles.haystack == "noise":
        parts, joint = noise_lines(units), "\n"
    else:
        parts, joint = [], "\n"
        while len(parts) < units:
            key, value = _DRAWS[needles.key](others), _DRAWS[needles.value](others)
            # A second needle for the key asked for would make two answers right.
            if key not in keys:
                parts.append(NEEDLE.format(kind=needles.value, key=key, value=value))
    count = len(parts)
    for depth, sentence in reversed(placed):
        parts.insert(int(count * depth), sentence)
    return Draft(
        *_question(needles, asked, joint.join(parts)),
        references=tuple(value for key in asked for value in values[key]),
        evidence=tuple(sentence for key, sentence in hidden if key in asked),
    )


def _question(needles: Needles, asked: Sequence[str], context: str) -> tuple[str, str]:
    """The request and how its answer starts, in the singular where one value is asked for."""
    names = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
    one = needles.has_one_answer
    kind = needles.value.removesuffix("s") if one else needles.value
    hides = f"A special magic {kind} is" if one else f"Special magic {kind} are"
    what = f"the special magic {kind} for {names} that the text mentions"
    return (
        f"{hides} hidden somewhere in the text below. Read it and keep the {kind} in mind: a "
        f"question about {'it' if one else 'them'} follows.\n{context}\n"
        + (f"What is {what}?" if one else f"What are all {what}?"),
        f" The special magic {kind} for {names} that the text mentions {'is' if one else 'are'}",
    )


def noise_lines(units: int) -> list[str]:
    """`units` sentences of noise, five to a line, the last line as long as it comes."""
    return [
        " ".join(NOISE[: min(len(NOISE), units - start)]) for start in range(0, units, len(NOISE))
    ]


def _essay_words(rng: random.Random, units: int, haystack: Sequence[str]) -> list[str]:
    """Sentences of the haystack from a random one on, `units` words in all."""
    start, left = rng.randrange(len(haystack)), units
    sentences: list[str] = []
    while left > 0:
        words = haystack[(start + len(sentences)) % len(haystack)].split()[:left]
        sentences.append(" ".join(words))
        left -= len(words)
    return sentences


NEEDLE_TASKS: tuple[Task, ...] = tuple(
    Task(
        name,
        f"{needles.needles} needle{'s' if needles.needles > 1 else ''} in "
        f"{'other needles' if needles.haystack == 'needles' else needles.haystack}, "
        f"keys {needles.key}, values {needles.value}",
        128,
        _LEAST[needles.haystack],
        partial(needle_draft, needles),
        needles.has_one_answer,
    )
    for name, needles in RULER_NEEDLES.items()
)
