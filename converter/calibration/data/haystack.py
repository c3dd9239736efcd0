"""Filler for recall examples: plain English from a small grammar, or the user's own text.

None of the grammar's words occurs in a fact, so filler can neither state nor contradict one.
"""

from __future__ import annotations

import random
import re
import textwrap
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_FILE = Path(__file__).with_name("words.toml")
_GRAMMAR = tomllib.loads(_FILE.read_text(encoding="utf-8"))["filler"]
_CHOICES = {name: choices.split("|") for name, choices in _GRAMMAR["choices"].items()}
# Longer runs without a full stop (tables, code) are cut at white space: a sentence is the unit in
# which an example's length can be met.
_LONGEST_CHARACTERS = 300
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])")


def filler_sentence(rng: random.Random) -> str:
    """Return one plain English sentence of about ten words."""
    pattern = rng.choice(_GRAMMAR["patterns"])
    sentence = _PLACEHOLDER.sub(lambda match: rng.choice(_CHOICES[match.group(1)]), pattern)
    return sentence[0].upper() + sentence[1:]


def text_sentences(text: str) -> tuple[str, ...]:
    """Split a text at sentence boundaries, white space made single, overlong runs cut."""
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
    """Yield sentences without end: drawn freely, or on from a random one and around the end."""
    index = rng.randrange(len(sentences))
    while True:
        yield sentences[index]
        index = (index + 1) % len(sentences) if in_order else rng.randrange(len(sentences))
