"""What task generators draw keys and lists from: everyday English words, and UUIDs."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path


@cache
def _words() -> list[list[str]]:
    """Adjectives, nouns and verbs."""
    text = Path(__file__).with_name("words.txt").read_text(encoding="utf-8")
    return [paragraph.split() for paragraph in text.split("\n\n")]


@cache
def compounds() -> tuple[str, ...]:
    """Every adjective-noun pair, such as `brave-lantern`, in a fixed order."""
    adjectives, nouns, _ = _words()
    return tuple(f"{adjective}-{noun}" for adjective in adjectives for noun in nouns)


@cache
def single_words() -> tuple[str, ...]:
    """Every word of the lists once, in a fixed order."""
    return tuple(sorted({word for words in _words() for word in words}))


def random_uuid(rng: random.Random) -> str:
    """A UUID of version 4."""
    # Not `uuid.UUID`, which takes long to write out hundreds of thousands of these.
    digits = f"{rng.getrandbits(128):032x}"
    variant = "89ab"[int(digits[16], 16) % 4]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"
