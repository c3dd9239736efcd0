"""Two further lookups: UUID pairs (arXiv 2307.03172, lost in the middle) and copying back."""

from __future__ import annotations

import random
from collections.abc import Sequence

from converter.evaluation.tasks.item import Draft, ItemSpec, Task
from converter.evaluation.tasks.lexicon import random_uuid


def pairs_draft(spec: ItemSpec, units: int, _haystack: Sequence[str]) -> Draft:
    """A JSON object of random UUIDs; what is the value of one key?"""
    rng = spec.rng()
    asked, value = random_uuid(rng), random_uuid(rng)
    rng = random.Random(rng.random())  # noqa: S311 (reproducible on purpose)
    pairs = [(random_uuid(rng), random_uuid(rng)) for _ in range(units)]
    pairs.insert(min(int(spec.depth * (units + 1)), units), (asked, value))
    text = "{" + ",\n ".join(f'"{key}": "{other}"' for key, other in pairs) + "}"
    return Draft(
        f'Look up one key in this JSON object.\n\n{text}\n\nKey: "{asked}"',
        "\nCorresponding value:",
        (value,),
        (f'"{value}"',),
    )


def copying_draft(spec: ItemSpec, units: int, haystack: Sequence[str]) -> Draft:
    """A text; which sentence comes after a given one?"""
    start = spec.rng().randrange(len(haystack))
    # No sentence twice, so that the question has one answer.
    sentences = list(dict.fromkeys((*haystack[start:], *haystack[:start])))[:units]
    place = min(int(spec.depth * (len(sentences) - 1)), len(sentences) - 2)
    before, answer = sentences[place : place + 2]
    return Draft(
        f"{' '.join(sentences)}\n\nQuote the sentence of the text above that comes directly after "
        f'"{before}"',
        "\nThe next sentence is:",
        (answer,),
        (answer,),
    )


LOOKUP_TASKS: tuple[Task, ...] = (
    # A UUID is 36 characters, one token each at worst.
    Task("kv", "the value of one of many UUID keys", 48, 1, pairs_draft, True),
    Task("copy", "the sentence after a given one, copied back", None, 2, copying_draft, True),
)
