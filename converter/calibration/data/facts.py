"""The facts of a recall example, as data and as sentences, and the questions that ask for them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from converter.common.errors import DataError


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


KINDS = ("pair", "link", "relation", "span")

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
class Facts:
    """The facts of one context, as data.

    Attributes:
        gives: (key, what it is given), keys distinct.
        calls: (key, another name of it, that is given something or called something else).
        relations: (relation, key, value), each relation and each key used more than once.
        spans: (tag, six words).
    """

    gives: tuple[tuple[str, str], ...]
    calls: tuple[tuple[str, str], ...]
    relations: tuple[tuple[str, str, str], ...]
    spans: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Question:
    """A question with the fact sentences that answer it."""

    kind: str
    cloze: str
    answer: str
    evidence: tuple[str, ...]


def give_sentence(key: str, value: str) -> str:
    """State what a key is given."""
    return f"Give {key} {value}."


def call_sentence(key: str, followed: str) -> str:
    """State another name of a key."""
    return f"Call {key} {followed}."


def relation_sentence(relation: str, key: str, value: str) -> str:
    """State what somebody did with a key and a value."""
    return f"They {relation} {key} {value}."


def span_sentence(tag: str, words: Sequence[str]) -> str:
    """State the six words noted under a tag."""
    return f"Say {tag} {' '.join(words)}."


def draw_facts(rng: random.Random, counts: Counts = DEFAULT_COUNTS) -> Facts:
    """Draw the facts of one context: no key, value, tag or span word has two roles."""
    pairs, links, chained = counts.pairs, counts.links, counts.chained_links
    keys = rng.sample(KEYS, pairs + links + counts.relation_keys)
    values = rng.sample(VALUES, pairs + counts.relation_keys * counts.relations_per_key)
    held, called = keys[:pairs], keys[pairs : pairs + links]
    relations = rng.sample(RELATIONS, counts.relations_per_key)
    bound = [(relation, key) for key in keys[pairs + links :] for relation in relations]
    words = rng.sample(SPAN_WORDS, counts.spans * SPAN_LENGTH)
    tags = rng.sample(TAGS, counts.spans)
    last_links = called[chained : 2 * chained]
    followed = [*last_links, *rng.sample(held, links - chained)]
    return Facts(
        gives=tuple(zip(held, values[:pairs], strict=True)),
        calls=tuple(zip(called, followed, strict=True)),
        relations=tuple((*pair, value) for pair, value in zip(bound, values[pairs:], strict=True)),
        spans=tuple(
            (tag, tuple(words[i * SPAN_LENGTH : (i + 1) * SPAN_LENGTH]))
            for i, tag in enumerate(tags)
        ),
    )


def fact_sentences(facts: Facts) -> tuple[str, ...]:
    """Every fact as the sentence that states it."""
    return (
        *(give_sentence(*fact) for fact in facts.gives),
        *(call_sentence(*fact) for fact in facts.calls),
        *(relation_sentence(*fact) for fact in facts.relations),
        *(span_sentence(*fact) for fact in facts.spans),
    )


def questions(facts: Facts, kind: str) -> tuple[Question, ...]:
    """Every question of one kind that the facts answer."""
    if kind == "pair":
        return tuple(
            Question(kind, f"Give {key}", value, (give_sentence(key, value),))
            for key, value in facts.gives
        )
    if kind == "link":
        return tuple(_link_question(facts, key) for key, _ in facts.calls)
    if kind == "relation":
        return tuple(
            Question(
                kind,
                f"They {relation} {key}",
                value,
                (relation_sentence(relation, key, value),),
            )
            for relation, key, value in facts.relations
        )
    if kind == "span":
        return tuple(
            Question(kind, f"Say {tag}", " ".join(words), (span_sentence(tag, words),))
            for tag, words in facts.spans
        )
    raise DataError(f"unknown kind of recall question {kind!r}; known: {', '.join(KINDS)}")


def _link_question(facts: Facts, key: str) -> Question:
    given, names = dict(facts.gives), dict(facts.calls)
    evidence, current = [], key
    while current in names:
        evidence.append(call_sentence(current, names[current]))
        current = names[current]
    evidence.append(give_sentence(current, given[current]))
    return Question("link", f"Now give {key}", given[current], tuple(evidence))
