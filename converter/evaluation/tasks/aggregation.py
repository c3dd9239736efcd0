"""RULER's other tasks (arXiv 2404.06654): variable tracking, common words, frequent words.

Parameters are the published ones; the wording of the requests is ours.
"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Sequence

from converter.evaluation.tasks.item import Draft, ItemSpec, Task
from converter.evaluation.tasks.lexicon import compounds, single_words
from converter.evaluation.tasks.needles import noise_lines

HOPS = 4
NAME_LETTERS, EXAMPLE_NAME_LETTERS = 5, 3
COMMON_WORDS = 10
# Below this length, common and uncommon words repeat (6, 1) times, from it on (30, 3); the solved
# example before them has 20 words at (3, 1) or 40 at (10, 3).
LONG_TOKENS = 4096
REPEATS = {False: (6, 1), True: (30, 3)}
EXAMPLE = {False: (20, (3, 1)), True: (40, (10, 3))}
# Frequent words: six letters, as many different ones as a fiftieth of the length in tokens, the
# k-th as frequent as k to the power of minus two; the first is dots, and the next three are asked.
CODE_LETTERS, TOKENS_PER_CODE, ASKED_CODES = 6, 50, 3


def tracking_draft(spec: ItemSpec, units: int, _haystack: Sequence[str]) -> Draft:
    """Variables assigned to one another; which of them hold a value?"""
    rng = spec.rng()
    solved, names, _ = _tracking(rng, EXAMPLE_NAME_LETTERS, noise_lines(5))
    example = f"{solved} {' '.join(names)}"
    question, names, chain = _tracking(rng, NAME_LETTERS, noise_lines(units))
    request, answer, prefix = question.rpartition(" Answer:")
    return Draft(f"{example}\n\n{request}", answer + prefix, tuple(names), tuple(chain))


def _tracking(
    rng: random.Random, letters: int, lines: list[str]
) -> tuple[str, list[str], list[str]]:
    """The question with the start of its answer, the names to find, and the assignments."""
    names = _different(rng, string.ascii_uppercase, letters, HOPS + 1)
    value = rng.randint(10000, 99999)
    sources = [str(value), *(f"VAR {name}" for name in names[:-1])]
    chain = [f"VAR {name} = {source}" for name, source in zip(names, sources, strict=True)]
    # At random depths in order, whatever the number of lines.
    depths = sorted(rng.random() for _ in chain)
    count = len(lines)
    for depth, assignment in reversed(list(zip(depths, chain, strict=True))):
        lines.insert(int(depth * (count + 1)), assignment)
    text = "\n".join(lines)
    return (
        "Follow the variable assignments that are hidden in the text below.\n\n"
        f"{text}\nQuestion: Which variables have the value {value}, directly or through others? "
        f"Answer: In the text above, {len(names)} variables have the value {value}, namely:",
        names,
        chain,
    )


def _different(rng: random.Random, letters: str, length: int, count: int) -> list[str]:
    """So many different random words of so many letters."""
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(rng.choices(letters, k=length))] = None
    return list(words)


def common_words_draft(spec: ItemSpec, units: int, _haystack: Sequence[str]) -> Draft:
    """A numbered list of words; which ten are the most common?"""
    rng, long = spec.rng(), spec.length_tokens >= LONG_TOKENS
    example_words, example_repeats = EXAMPLE[long]
    solved, prefix, common = _common_words(rng, example_words, example_repeats)
    example = f"{solved}{prefix} {_numbered(common)}"
    request, prefix, common = _common_words(rng, units, REPEATS[long])
    return Draft(f"{example}\n{request}", prefix, tuple(common))


def _common_words(
    rng: random.Random, different: int, repeats: tuple[int, int]
) -> tuple[str, str, list[str]]:
    # In an order that does not depend on how many are taken. Texts longer than the dictionary go on
    # with pairs of its words.
    words = rng.sample(single_words(), len(single_words()))
    if different > len(words):
        words += random.Random(rng.random()).sample(compounds(), len(compounds()))  # noqa: S311
    words = words[:different]
    common = words[:COMMON_WORDS]
    entries = common * repeats[0] + words[COMMON_WORDS:] * repeats[1]
    rng.shuffle(entries)
    return (
        "Here is a numbered list of words, some of which occur more often than others. Keep the "
        f"most frequent ones in mind.\n{_numbered(entries)}\n"
        f"Question: Which {COMMON_WORDS} words occur most often in this list?",
        f" Answer: The {COMMON_WORDS} words that occur most often in this list are:",
        common,
    )


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


def frequent_words_draft(spec: ItemSpec, units: int, _haystack: Sequence[str]) -> Draft:
    """A text of made-up words with Zipf's frequencies; which three are the most frequent?"""
    rng = spec.rng()
    vocabulary = max(spec.length_tokens // TOKENS_PER_CODE, ASKED_CODES + 2)
    codes = ["...", *_different(rng, string.ascii_lowercase, CODE_LETTERS, vocabulary)[1:]]
    entries = [
        code
        for rank, code in enumerate(codes, start=1)
        for _ in range(int(units / rank**2 / (math.pi**2 / 6)))
    ]
    rng.shuffle(entries)
    return Draft(
        "Below is a text in code. Count how often each code word occurs and find the three most "
        f"frequent ones. {' '.join(entries)}\nQuestion: Without explaining, and leaving out the "
        "dots '...': which three code words occur most often in the text above?",
        " Answer: The three code words that occur most often in the text above are:",
        tuple(codes[1 : 1 + ASKED_CODES]),
    )


AGGREGATION_TASKS: tuple[Task, ...] = (
    Task("vt", "variable tracking, one chain of 4 hops in noise", 30, 5, tracking_draft, False),
    Task("cwe", "the 10 most common words of a list", 120, 20, common_words_draft, False),
    # With fewer than 80 words the fourth frequent one would be as frequent as the fifth.
    Task("fwe", "the 3 most frequent code words of a text", 50, 80, frequent_words_draft, False),
)
