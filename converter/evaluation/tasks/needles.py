"""RULER's needle tasks (arXiv 2404.06654): sentences with magic values, hidden in a haystack.

Needles, parameters, haystacks and depths are the published ones; the wording of the request is
ours, and essays are the user's text or plain sentences made here.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from converter.evaluation.tasks.item import Draft, Sketch, Task
from converter.evaluation.tasks.lexicon import compounds

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
VALUE_DIGITS = 7
# Forty depths in whole percent, as published: evenly spaced, rounded to even.
DEPTHS: tuple[int, ...] = tuple(round(100 * i / 39) for i in range(40))
NEW_TOKENS = 128


@dataclass(frozen=True)
class Needles:
    """The published parameters of one needle task.

    Attributes:
        haystack: `noise`, one line over and over; `essay`; or `needles`, made of other needles.
        key: what keys are: `words` or `uuids`.
        value: what values are: `numbers` or `uuids`.
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


def _number(rng: random.Random) -> str:
    return str(rng.randint(10 ** (VALUE_DIGITS - 1), 10**VALUE_DIGITS - 1))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


_DRAWS: dict[str, Callable[[random.Random], str]] = {
    "numbers": _number,
    "words": lambda rng: rng.choice(compounds()),
    "uuids": _uuid,
}


def needle_draft(spec: Needles, sketch: Sketch) -> Draft:
    """A needle question.

    A single needle asked for lies at the sketch's depth; all others lie at random ones out of
    `DEPTHS`.
    """
    rng = sketch.rng
    keys: list[str] = []
    while len(keys) < max(spec.keys, spec.queries):
        key = _DRAWS[spec.key](rng)
        if key not in keys:
            keys.append(key)
    values = {key: [_DRAWS[spec.value](rng) for _ in range(spec.values)] for key in keys}
    asked = rng.sample(keys, spec.queries)
    hidden = [
        (key, NEEDLE.format(kind=spec.value, key=key, value=value))
        for key in keys
        for value in values[key]
    ]
    depths = [depth / 100 for depth in rng.sample(DEPTHS, len(hidden))]
    if spec.queries * spec.values == 1:
        depths = [
            sketch.depth if key in asked else depth
            for (key, _), depth in zip(hidden, depths, strict=True)
        ]
    needles = [(depth, sentence) for depth, (_, sentence) in zip(depths, hidden, strict=True)]
    context = _HAYSTACKS[spec.haystack](sketch, spec, needles)
    return Draft(
        *_question(spec, asked, context),
        references=tuple(value for key in asked for value in values[key]),
        evidence=tuple(sentence for key, sentence in hidden if key in asked),
    )


def _question(spec: Needles, asked: Sequence[str], context: str) -> tuple[str, str]:
    """The request and how its answer starts, in the singular where one value is asked for."""
    names = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
    one = spec.queries * spec.values == 1
    kind = spec.value.removesuffix("s") if one else spec.value
    hides = f"A special magic {kind} is" if one else f"Special magic {kind} are"
    what = f"the special magic {kind} for {names} that the text mentions"
    return (
        f"{hides} hidden somewhere in the text below. Read it and keep the {kind} in mind: a "
        f"question about {'it' if one else 'them'} follows.\n{context}\n"
        + (f"What is {what}?" if one else f"What are all {what}?"),
        f" The special magic {kind} for {names} that the text mentions {'is' if one else 'are'}",
    )


def _lines(lines: list[str], needles: list[tuple[float, str]]) -> str:
    """Lines with needles at their depths between them."""
    for depth, sentence in sorted(needles, reverse=True):
        lines.insert(int(len(lines) * depth), sentence)
    return "\n".join(lines)


def noise_lines(units: int) -> list[str]:
    """`units` sentences of noise, five to a line, the last line as long as it comes."""
    return [
        " ".join(NOISE[: min(len(NOISE), units - start)]) for start in range(0, units, len(NOISE))
    ]


def _noise(sketch: Sketch, spec: Needles, needles: list[tuple[float, str]]) -> str:
    del spec
    return _lines(noise_lines(sketch.units), needles)


def _needles(sketch: Sketch, spec: Needles, needles: list[tuple[float, str]]) -> str:
    # Another generator, so that a larger haystack draws the same question.
    rng = random.Random(sketch.rng.random())  # noqa: S311 (reproducible on purpose)
    others: list[str] = []
    while len(others) < sketch.units:
        key, value = _DRAWS[spec.key](rng), _DRAWS[spec.value](rng)
        # A second needle for the key asked for would make two answers right.
        if not any(f"for {key} is" in sentence for _, sentence in needles):
            others.append(NEEDLE.format(kind=spec.value, key=key, value=value))
    return _lines(others, needles)


def _essay(sketch: Sketch, spec: Needles, needles: list[tuple[float, str]]) -> str:
    """The first words of the haystack, needles between its sentences."""
    del spec
    sentences = essay_words(sketch)
    placed = sorted(needles)
    cuts = [int(len(sentences) * depth) for depth, _ in placed]
    parts: list[str] = []
    for start, end, (_, needle) in zip([0, *cuts], cuts, placed, strict=False):
        parts += [*sentences[start:end], needle]
    return " ".join([*parts, *sentences[cuts[-1] :]])


def essay_words(sketch: Sketch) -> list[str]:
    """Sentences of the haystack from a random one on, `units` words in all."""
    count = len(sketch.haystack)
    start = random.Random(sketch.rng.random()).randrange(count)  # noqa: S311
    sentences: list[str] = []
    left = sketch.units
    while left > 0:
        words = sketch.haystack[(start + len(sentences)) % count].split()[:left]
        sentences.append(" ".join(words))
        left -= len(words)
    return sentences


_HAYSTACKS = {"noise": _noise, "needles": _needles, "essay": _essay}
# Words of a haystack that can hold a needle; noise counts sentences and needles count needles.
_LEAST = {"noise": len(NOISE), "essay": 12, "needles": 1}


def _task(name: str, spec: Needles) -> Task:
    what = f"{spec.needles} needle{'s' if spec.needles > 1 else ''}"
    return Task(
        name=name,
        summary=f"{what} in {'other needles' if spec.haystack == 'needles' else spec.haystack}, "
        f"keys {spec.key}, values {spec.value}",
        new_tokens=NEW_TOKENS,
        least_units=_LEAST[spec.haystack],
        has_depth=spec.queries * spec.values == 1,
        draft=lambda sketch: needle_draft(spec, sketch),
    )


NEEDLE_TASKS: tuple[Task, ...] = tuple(_task(name, spec) for name, spec in RULER_NEEDLES.items())
