"""The facts of a recall example, and the questions that ask for them."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

KINDS = ("pair", "link", "relation", "span")
CALL = "call"

_WORDS = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))["facts"]
KEYS, VALUES, RELATIONS, TAGS, SPAN_WORDS = (
    tuple(_WORDS[role].split()) for role in ("keys", "values", "relations", "tags", "span_words")
)
SPAN_LENGTH = 6


@dataclass(frozen=True)
class Counts:
    """How many facts of each kind a context holds.

    With a single chain every link question of a context would have the same answer.

    Attributes:
        pairs: keys that are given something.
        links: keys with another name, which is given something or has another name again.
        chained_links: how many links, at most half, lead to another link; at most `pairs` do not.
        relations_per_key: relations that each of the `relation_keys` takes part in.
    """

    pairs: int = 6
    links: int = 6
    chained_links: int = 3
    relation_keys: int = 2
    relations_per_key: int = 2
    spans: int = 2


DEFAULT_COUNTS = Counts()


@dataclass(frozen=True)
class Fact:
    """What a context states in one sentence, as "Give Amber drums." does.

    Attributes:
        kind: of question that asks for it; `call` for another name of a key, which links follow.
        cloze: the sentence without its last words, the answer.
    """

    kind: str
    cloze: str
    answer: str

    @property
    def sentence(self) -> str:
        """The whole of it."""
        return f"{self.cloze} {self.answer}."


@dataclass(frozen=True)
class Question:
    """A question with the fact sentences that answer it."""

    kind: str
    cloze: str
    answer: str
    evidence: tuple[str, ...]


def draw_facts(rng: random.Random, counts: Counts = DEFAULT_COUNTS) -> tuple[Fact, ...]:
    """Draw the facts of one context: no key, value, tag or span word has two roles."""
    pairs, links, chained = counts.pairs, counts.links, counts.chained_links
    keys = rng.sample(KEYS, pairs + links + counts.relation_keys)
    values = rng.sample(VALUES, pairs + counts.relation_keys * counts.relations_per_key)
    held, called = keys[:pairs], keys[pairs : pairs + links]
    relations = rng.sample(RELATIONS, counts.relations_per_key)
    bound = [f"They {relation} {key}" for key in keys[pairs + links :] for relation in relations]
    words = rng.sample(SPAN_WORDS, counts.spans * SPAN_LENGTH)
    tags = rng.sample(TAGS, counts.spans)
    last_links = called[chained : 2 * chained]
    followed = [*last_links, *rng.sample(held, links - chained)]
    spans = [" ".join(words[i : i + SPAN_LENGTH]) for i in range(0, len(words), SPAN_LENGTH)]
    return (
        *(Fact("pair", f"Give {k}", v) for k, v in zip(held, values[:pairs], strict=True)),
        *(Fact(CALL, f"Call {k}", name) for k, name in zip(called, followed, strict=True)),
        *(Fact("relation", cloze, v) for cloze, v in zip(bound, values[pairs:], strict=True)),
        *(Fact("span", f"Say {tag}", span) for tag, span in zip(tags, spans, strict=True)),
    )


def questions(facts: Sequence[Fact], kind: str) -> tuple[Question, ...]:
    """Every question of one of the `KINDS` that the facts answer."""
    stated = {fact.cloze: fact for fact in facts}
    found = []
    for fact in facts:
        if kind == "link" and fact.kind == CALL:
            followed = [fact]
            while followed[-1].kind == CALL:
                name = followed[-1].answer
                followed.append(stated.get(f"Call {name}") or stated[f"Give {name}"])
            cloze = f"Now give {fact.cloze.removeprefix('Call ')}"
            evidence = tuple(each.sentence for each in followed)
            found.append(Question(kind, cloze, followed[-1].answer, evidence))
        elif fact.kind == kind:
            found.append(Question(kind, fact.cloze, fact.answer, (fact.sentence,)))
    return tuple(found)
