"""What a model is asked, how its answers are scored, and what makes items of a given length."""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from converter.common.errors import DataError
from converter.inference.tokenizer import Tokenizer, chat_text

# An answer that repeats the question's words before it gets to the point.
SPARE_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question, tokenized.

    Attributes:
        prompt: token ids that the model continues.
        references: what the answer should contain; for multiple choice, the right choice.
        match: `all` or `part`, of `score`; `choice` for multiple choice.
        new_tokens: how many tokens may be generated.
        length_tokens: the length asked for, prompt and room for the answer together; for a user's
            rows, their own.
        depth: where in the text the evidence was to be, 0 its start and 1 its end; None where the
            question is about the whole text.
        distance_tokens: tokens between the end of the evidence and the answer; None likewise.
        forced, forced_from: token ids of the prompt with the answer, and where it begins.
        choices: the same of the prompt with each choice.
        right_choice: index of the right one.
    """

    task: str
    prompt: tuple[int, ...]
    references: tuple[str, ...]
    match: str = "all"
    new_tokens: int
    length_tokens: int
    depth: float | None = None
    distance_tokens: int | None = None
    forced: tuple[int, ...]
    forced_from: int
    choices: tuple[tuple[tuple[int, ...], int], ...] = ()
    right_choice: int | None = None

    @property
    def largest_token(self) -> int:
        """The largest token id in it."""
        return max(*self.prompt, *self.forced, *(max(ids) for ids, _ in self.choices), 0)


@dataclass(frozen=True)
class Items:
    """Items in the order they are asked, and how many rows were left out for which reason."""

    items: tuple[Item, ...]
    dropped: Mapping[str, int]


def cleaned(prediction: str) -> str:
    """A prediction without outer white space, control characters made line ends."""
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip()


def score(prediction: str, references: Sequence[str], match: str) -> float:
    """Share of the references that a prediction holds, without case; for `part` the best one's.

    As RULER defines it (arXiv 2404.06654); `part` is its rule for question answering.
    """
    folded = prediction.lower()
    found = [reference.lower() in folded for reference in references]
    return float(any(found)) if match == "part" else sum(found) / len(found)


@dataclass(frozen=True)
class ItemSpec:
    """One item to be made: how long with its answer, how deep its evidence (0 to 1), its seed."""

    length_tokens: int
    depth: float
    seed: int

    def rng(self) -> random.Random:
        """Draws the same for every size that is tried."""
        return random.Random(self.seed)  # noqa: S311 (reproducible on purpose)


@dataclass(frozen=True)
class Draft:
    """A question as text, how its answer starts, and what the answer should contain.

    The last piece of evidence in the text gives the distance to the answer.
    """

    request: str
    prefix: str
    references: tuple[str, ...]
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A generated task.

    Attributes:
        summary: one line for reports.
        new_tokens: room for the answer; None for the references' own length and a little more.
        least_units: the smallest haystack that can hold the question.
        draft: makes the text of an item from so many units of haystack (words, sentences, pairs or
            entries, as the task counts) and the sentences to hide things in.
        has_depth: whether one piece of evidence can be put at a chosen depth.
    """

    name: str
    summary: str
    new_tokens: int | None
    least_units: int
    draft: Callable[[ItemSpec, int, Sequence[str]], Draft]
    has_depth: bool


class Prompter:
    """Turns texts into what a model reads, with its own tokenizer and chat template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.is_chat = bool(tokenizer.chat_template)

    def text(self, request: str, prefix: str = "") -> str:
        """The whole prompt: a chat where there is a template, with the answer's start behind it."""
        if not self.is_chat:
            return request + prefix
        return chat_text(self.tokenizer, [{"role": "user", "content": request}]) + prefix.lstrip()

    def ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a prompt; a template has written the special tokens already."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=not self.is_chat))

    def with_answer(self, text: str, answer: str, prefix: str = "") -> tuple[tuple[int, ...], int]:
        """Token ids of prompt and answer, and where they part from those of the prompt alone."""
        # A template ends where the answer begins; a text or a prefix ends with a word.
        starts_new = self.is_chat and not prefix
        joint = "" if starts_new or text[-1:].isspace() or answer[:1].isspace() else " "
        alone, whole = self.ids(text), self.ids(text + joint + answer)
        limit = min(len(alone), len(whole) - 1)
        shared = next((i for i in range(limit) if alone[i] != whole[i]), limit)
        return whole, max(shared, 1)

    def count(self, text: str) -> int:
        """Tokens of a text, without special ones."""
        return len(self.tokenizer.encode(text, add_special_tokens=False))


def generated_item(
    task: Task, prompter: Prompter, spec: ItemSpec, haystack: Sequence[str], guess: int
) -> tuple[Item, int]:
    """An item as long as asked to within one unit of haystack, and how many units it has.

    Their search begins at `guess`.

    Raises:
        DataError: the length cannot hold the question.
    """

    def made(units: int) -> tuple[Draft, str, tuple[int, ...], int]:
        draft = task.draft(spec, units, haystack)
        text = prompter.text(draft.request, draft.prefix)
        room = task.new_tokens or prompter.count(", ".join(draft.references)) + SPARE_TOKENS
        return draft, text, prompter.ids(text), room

    def length(units: int) -> int:
        _, _, prompt, room = made(units)
        return len(prompt) + room

    # A unit is a token at least: more of them fit only where the haystack has run out.
    most = spec.length_tokens
    units = largest(lambda units: length(units) <= most, task.least_units, guess, most)
    if units is None:
        raise DataError(
            f"the length cannot hold an item of {task.name}",
            where="--lengths",
            expected=f"at least {length(task.least_units)} tokens",
            got=f"{most} tokens",
            next_step="ask for longer items, or leave the task out",
        )
    if units == most:
        raise DataError(
            f"the text is too short for an item of {task.name}",
            where="--haystack",
            expected=f"enough for {most} tokens",
            got=f"{length(units)} tokens",
            next_step="give a longer text, or ask for shorter items",
        )
    draft, text, prompt, new_tokens = made(units)
    forced, forced_from = prompter.with_answer(text, ", ".join(draft.references), draft.prefix)
    last = max((text.rfind(sentence) + len(sentence) for sentence in draft.evidence), default=0)
    item = Item(
        task=task.name,
        prompt=prompt,
        references=draft.references,
        new_tokens=new_tokens,
        length_tokens=most,
        depth=spec.depth if task.has_depth else None,
        distance_tokens=len(prompt) - len(prompter.ids(text[:last])) if last else None,
        forced=forced,
        forced_from=forced_from,
    )
    return item, units


def largest(fits: Callable[[int], bool], least: int, guess: int, most: int) -> int | None:
    """The largest number from `least` to `most` that fits, when fewer always fit; None if none.

    With a guess near the result, few numbers are tried.
    """
    low, step = max(guess, least), 1
    while not fits(low):
        if low == least:
            return None
        low, step = max(least, low - step), step * 2
    high, step = low + 1, 1
    while high <= most and fits(high):
        low, high, step = high, high + step * 2, step * 2
    candidates = range(min(high, most + 1))
    return bisect_left(candidates, True, low + 1, key=lambda number: not fits(number)) - 1
