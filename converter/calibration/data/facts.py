"""The facts of a recall example, as data and as sentences, and the questions that ask for them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


KINDS = ("pair", "link", "relation", "span")
CALL = "call"

KEYS = _words(
    "Amber Birch Cedar Daisy Ember Fern Garnet Hazel Iris Jasper Kestrel Laurel Maple Nettle "
    "Olive Pearl Quartz Robin Sage Thistle Umber Violet Willow Yarrow Aspen Basil Clover Dove "
    "Elm Flint Ginger Heather Ivy Juniper Linden Myrtle Opal Poppy Rowan Rose"
)
VALUES = _words(
    "anchors baskets candles drums engines feathers guitars hammers jackets kettles ladders "
    "mirrors needles organs pencils ropes saddles tables violins wagons aprons bottles "
    "carpets daggers flutes gloves helmets jars knives lamps magnets nails oars pillows rings "
    "scarves trumpets vases whistles wheels"
)
RELATIONS = _words("lent sent showed handed offered owed")
TAGS = _words(
    "Alpha Bravo Charlie Delta Echo Foxtrot Golf Hotel India Kilo Lima Oscar Quebec Romeo "
    "Sierra Tango"
)
SPAN_WORDS = _words(
    "red blue green black white brown pink gold tall short fast slow warm cold soft hard loud "
    "calm deep wide thin thick sharp dull sweet sour fresh dry wet clean dark light heavy empty "
    "full round flat steep rough smooth"
)
SPAN_LENGTH = 6


@dataclass(frozen=True)
class Counts:
    """How many facts of each kind a context holds.

    With several chains the key asked for has to be used: with one, every link question of a context
    would have the same answer.

    Attributes:
        pairs: keys that are given something.
        links: keys with another name, which is given something or has another name again.
        chained_links: how many links, at most half, lead to another link; at most `pairs` do not.
        relation_keys: keys of relation facts.
        relations_per_key: relations that each of those keys takes part in.
        spans: tagged spans.
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
        kind: the kind of question that asks for it; `call` for another name of a key, which only
            links follow.
        cloze: the sentence without its last words.
        answer: these words.
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
    if kind == "link":
        stated = {fact.cloze: fact for fact in facts}
        keys = (fact.cloze.removeprefix("Call ") for fact in facts if fact.kind == CALL)
        return tuple(_link_question(stated, key) for key in keys)
    return tuple(
        Question(kind, fact.cloze, fact.answer, (fact.sentence,))
        for fact in facts
        if fact.kind == kind
    )


def _link_question(stated: Mapping[str, Fact], key: str) -> Question:
    evidence, name = [], key
    while call := stated.get(f"Call {name}"):
        evidence.append(call.sentence)
        name = call.answer
    give = stated[f"Give {name}"]
    return Question("link", f"Now give {key}", give.answer, (*evidence, give.sentence))
