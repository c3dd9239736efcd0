"""Two further lookups: UUID pairs (arXiv 2307.03172, lost in the middle) and copying back."""

from __future__ import annotations

import json
import random

from converter.evaluation.tasks.item import Draft, Sketch, Task

# A UUID is 36 characters, one token each at worst.
_UUID_TOKENS = 48


def pairs_draft(sketch: Sketch) -> Draft:
    """A JSON object of random UUIDs; what is the value of one key?"""
    asked, value = _uuid(sketch.rng), _uuid(sketch.rng)
    rng = random.Random(sketch.rng.random())  # noqa: S311 (reproducible on purpose)
    pairs = [(_uuid(rng), _uuid(rng)) for _ in range(sketch.units)]
    pairs.insert(min(int(sketch.depth * (sketch.units + 1)), sketch.units), (asked, value))
    lines = [f"{json.dumps(key)}: {json.dumps(held)}" for key, held in pairs]
    text = "{" + ",\n ".join(lines) + "}"
    return Draft(
        f"Look up one key in this JSON object.\n\n{text}\n\nKey: {json.dumps(asked)}",
        "\nCorresponding value:",
        (value,),
        (json.dumps(value),),
    )


def _uuid(rng: random.Random) -> str:
    # Not `uuid.UUID`, which takes long to write out hundreds of thousands of these.
    digits = f"{rng.getrandbits(128):032x}"
    variant = "89ab"[int(digits[16], 16) % 4]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"


def copying_draft(sketch: Sketch) -> Draft:
    """A text; which sentence comes after a given one?"""
    count = len(sketch.haystack)
    start = sketch.rng.randrange(count)
    sentences: list[str] = []
    seen: set[str] = set()
    # No sentence twice, so that the question has one answer.
    for step in range(count):
        sentence = sketch.haystack[(start + step) % count]
        if sentence not in seen:
            seen.add(sentence)
            sentences.append(sentence)
        if len(sentences) == sketch.units:
            break
    place = min(int(sketch.depth * (len(sentences) - 1)), len(sentences) - 2)
    before, answer = sentences[place : place + 2]
    return Draft(
        f"{' '.join(sentences)}\n\nQuote the sentence of the text above that comes directly after "
        f'"{before}"',
        "\nThe next sentence is:",
        (answer,),
        (answer,),
    )


LOOKUP_TASKS: tuple[Task, ...] = (
    Task("kv", "the value of one of many UUID keys", _UUID_TOKENS, 1, True, pairs_draft),
    Task("copy", "the sentence after a given one, copied back", None, 2, True, copying_draft),
)
