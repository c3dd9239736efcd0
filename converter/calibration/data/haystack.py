"""Filler for recall examples: plain English from a small grammar, or the user's own text.

None of the grammar's words occurs in a fact, so filler can neither state nor contradict one.
"""

from __future__ import annotations

import random
import re
import textwrap
from collections.abc import Iterator, Sequence

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_CHOICES: dict[str, tuple[str, ...]] = {
    name: tuple(choices.split("|"))
    for name, choices in {
        "person": "farmer|teacher|sailor|baker|doctor|child|woman|man|boy|girl|king|neighbour",
        "animal": "dog|cat|horse|bird|cow|fox|mouse|goat",
        "thing": "bread|book|letter|apple|map|boat|cart|stone|picture|coat",
        "place": "house|garden|river|market|school|forest|bridge|hill|village|road|harbour|kitchen",
        "personal": "old|young|kind|tired|happy|quiet|busy|clever",
        "quality": "small|large|new|good|strange|simple|broken|lovely",
        "goes": "walked|ran|went|came|returned|travelled",
        "acts": "found|made|saw|took|carried|bought|sold|lost|wanted|liked",
        "rests": "slept|waited|sat|stood|rested|played",
        "when": "in the morning|at night|every day|after lunch|before dinner|last week|"
        "on Sunday|in summer|for an hour|once again",
        "near": "near|by|behind|beside",
        "weather": "rain|wind|sun|snow",
    }.items()
}
_PATTERNS = (
    "The {personal} {person} {goes} to the {place} {when}.",
    "The {person} {acts} a {quality} {thing} and {goes} home.",
    "A {animal} {rests} {near} the {place} {when}.",
    "The {animal} and the {person} {rests} {near} the {quality} {place}.",
    "{when}, the {person} {acts} the {thing}.",
    "There was a {quality} {thing} {near} the {place}.",
    "The {weather} came over the {place} {when}.",
    "She {acts} the {thing} that he {acts} {when}.",
    "He {goes} past the {place} with a {quality} {thing}.",
    "They {rests} {when} because the {person} was {personal}.",
    "It was {quality}, but the {animal} {rests} there {when}.",
    "We {acts} no {thing} {when}.",
)
# Longer runs without a full stop (tables, code) are cut at white space: a sentence is the unit in
# which an example's length can be met.
_LONGEST_CHARACTERS = 300
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])")


def filler_sentence(rng: random.Random) -> str:
    """Return one plain English sentence of about ten words."""
    pattern = rng.choice(_PATTERNS)
    sentence = _PLACEHOLDER.sub(lambda match: rng.choice(_CHOICES[match.group(1)]), pattern)
    return sentence[0].upper() + sentence[1:]


def text_sentences(text: str) -> tuple[str, ...]:
    """Split a text at sentence boundaries, white space made single, overlong runs cut.

    Returns:
        The sentences in order; empty when the text holds nothing but white space.
    """
    return tuple(
        part
        for sentence in _SENTENCE_END.split(text)
        for part in textwrap.wrap(
            " ".join(sentence.split()),
            _LONGEST_CHARACTERS,
            break_long_words=False,
            break_on_hyphens=False,
        )
    )


def filler_pool(rng: random.Random, text: str | None, pool_size: int) -> tuple[str, ...]:
    """Sentences to fill with: the text's when there is one, else as many of the grammar's."""
    if text is not None:
        return text_sentences(text)
    return tuple(filler_sentence(rng) for _ in range(pool_size))


def filler_stream(rng: random.Random, sentences: Sequence[str], *, in_order: bool) -> Iterator[str]:
    """Yield sentences without end.

    Args:
        rng: draws.
        sentences: the pool.
        in_order: read on from a random one, around the end, as in the text; else draw freely.
    """
    index = rng.randrange(len(sentences))
    while True:
        yield sentences[index]
        index = (index + 1) % len(sentences) if in_order else rng.randrange(len(sentences))
