"""RULER's other tasks (arXiv 2404.06654): variable tracking, common words, frequent words.

Parameters are the published ones; the wording of the requests is ours.
"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Sequence

from converter.evaluation.tasks.item import Draft, Sketch, Task
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
_ZETA_OF_2 = math.pi**2 / 6
NEW_TOKENS = {"vt": 30, "cwe": 120, "fwe": 50}


def tracking_draft(sketch: Sketch) -> Draft:
    """Variables assigned to one another; which of them hold a value?"""
    rng = sketch.rng
    solved, names, _ = _tracking(rng, EXAMPLE_NAME_LETTERS, noise_lines(5))
    example = f"{solved} {' '.join(names)}"
    question, names, chain = _tracking(rng, NAME_LETTERS, noise_lines(sketch.units))
    cut = question.rindex(" Answer:")
    return Draft(f"{example}\n\n{question[:cut]}", question[cut:], tuple(names), tuple(chain))


def _tracking(
    rng: random.Random, letters: int, lines: list[str]
) -> tuple[str, list[str], list[str]]:
    """The question with the start of its answer, the names to find, and the assignments."""
    names: list[str] = []
    while len(names) < HOPS + 1:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    value = rng.randint(10000, 99999)
    sources = [str(value), *(f"VAR {name}" for name in names[:-1])]
    chain = [f"VAR {name} = {source}" for name, source in zip(names, sources, strict=True)]
    # Random places in order, whatever the number of lines.
    places = sorted(rng.random() for _ in chain)
    count = len(lines)
    for place, assignment in reversed(list(zip(places, chain, strict=True))):
        lines.insert(int(place * (count + 1)), assignment)
    text = "\n".join(lines)
    return (
        "Follow the variable assignments that are hidden in the text below.\n\n"
        f"{text}\nQuestion: Which variables have the value {value}, directly or through others? "
        f"Answer: In the text above, {len(names)} variables have the value {value}, namely:",
        names,
        chain,
    )


def common_words_draft(sketch: Sketch) -> Draft:
    """A numbered list of words; which ten are the most common?"""
    long = sketch.length_tokens >= LONG_TOKENS
    example_words, example_repeats = EXAMPLE[long]
    solved, prefix, common = _common_words(sketch.rng, example_words, example_repeats)
    example = f"{solved}{prefix} {_numbered(common)}"
    request, prefix, common = _common_words(sketch.rng, sketch.units, REPEATS[long])
    return Draft(f"{example}\n{request}", prefix, tuple(common), ())


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


def frequent_words_draft(sketch: Sketch) -> Draft:
    """A text of made-up words with Zipf's frequencies; which three are the most frequent?"""
    rng = sketch.rng
    vocabulary = max(sketch.length_tokens // TOKENS_PER_CODE, ASKED_CODES + 2)
    codes: list[str] = []
    known: set[str] = set()
    while len(codes) < vocabulary:
        code = "".join(rng.choices(string.ascii_lowercase, k=CODE_LETTERS))
        if code not in known:
            known.add(code)
            codes.append(code)
    codes[0] = "..."
    entries = [
        code
        for rank, code in enumerate(codes, start=1)
        for _ in range(int(sketch.units / rank**2 / _ZETA_OF_2))
    ]
    rng.shuffle(entries)
    return Draft(
        "Below is a text in code. Count how often each code word occurs and find the three most "
        f"frequent ones. {' '.join(entries)}\nQuestion: Without explaining, and leaving out the "
        "dots '...': which three code words occur most often in the text above?",
        " Answer: The three code words that occur most often in the text above are:",
        tuple(codes[1 : 1 + ASKED_CODES]),
        (),
    )


# Fewer words than this, and the fourth frequent word would be as frequent as the fifth.
_LEAST_CODES = 80

AGGREGATION_TASKS: tuple[Task, ...] = (
    Task(
        "vt",
        f"variable tracking, one chain of {HOPS} hops in noise",
        NEW_TOKENS["vt"],
        5,
        False,
        tracking_draft,
    ),
    Task(
        "cwe",
        f"the {COMMON_WORDS} most common words of a list",
        NEW_TOKENS["cwe"],
        2 * COMMON_WORDS,
        False,
        common_words_draft,
    ),
    Task(
        "fwe",
        f"the {ASKED_CODES} most frequent code words of a text",
        NEW_TOKENS["fwe"],
        _LEAST_CODES,
        False,
        frequent_words_draft,
    ),
)
