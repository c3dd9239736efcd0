"""What a model is asked, and what every task generator needs to make it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from converter.common.errors import DataError
from converter.inference.tokenizer import Tokenizer


@dataclass(frozen=True)
class Item:
    """One question, tokenized.

    Attributes:
        task: the task's name.
        prompt: token ids that the model continues.
        references: what the answer should contain; for multiple choice, the right choice.
        match: `all` or `part`, of `converter.evaluation.tasks.scoring.RULES`; `choice` for multiple
            choice.
        new_tokens: how many tokens may be generated.
        length_tokens: the length asked for, prompt and room for the answer together; for a user's
            rows, their own.
        depth: where in the text the evidence was to be, 0 its start and 1 its end; None where the
            question is about the whole text.
        distance_tokens: tokens between the end of the evidence and the answer; None likewise.
        forced: token ids of the prompt with the answer.
        forced_from: where in them the answer begins.
        choices: (token ids, where the choice begins) of the prompt with each choice.
        right_choice: index of the right one.
    """

    task: str
    prompt: tuple[int, ...]
    references: tuple[str, ...]
    match: str
    new_tokens: int
    length_tokens: int
    depth: float | None
    distance_tokens: int | None
    forced: tuple[int, ...]
    forced_from: int
    choices: tuple[tuple[tuple[int, ...], int], ...] = ()
    right_choice: int | None = None

    @property
    def largest_token(self) -> int:
        """The largest token id in it."""
        return max(*self.prompt, *self.forced, *(max(ids) for ids, _ in self.choices), 0)


@dataclass(frozen=True)
class Cell:
    """One item to be made: how long, and how deep its evidence."""

    length_tokens: int
    depth: float
    seed: int


@dataclass(frozen=True)
class Draft:
    """A question as text.

    Attributes:
        request: everything the model reads.
        prefix: how its answer starts.
        references: what the answer should contain.
        evidence: the sentences that hold the answer; the last one in the text gives the distance.
    """

    request: str
    prefix: str
    references: tuple[str, ...]
    evidence: tuple[str, ...]


@dataclass(frozen=True)
class Sketch:
    """What a draft is made from.

    Attributes:
        rng: draws everything; equal for every size that is tried.
        units: how much haystack: words, sentences, pairs or entries, as the task counts.
        depth: where the evidence goes, 0 the start and 1 the end.
        length_tokens: the length of the whole, for tasks whose parameters depend on it.
        haystack: sentences to hide things in.
    """

    rng: random.Random
    units: int
    depth: float
    length_tokens: int
    haystack: Sequence[str]


@dataclass(frozen=True)
class Task:
    """A generated task.

    Attributes:
        name: what `--tasks` calls it.
        summary: one line for help and reports.
        new_tokens: room for the answer; None for the references' own length and a little more.
        least_units: the smallest haystack that can hold the question.
        has_depth: whether one piece of evidence can be put at a chosen depth.
        draft: makes the text.
    """

    name: str
    summary: str
    new_tokens: int | None
    least_units: int
    has_depth: bool
    draft: Callable[[Sketch], Draft]


class Prompter:
    """Turns texts into what a model reads, with its own tokenizer and chat template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._chat = bool(tokenizer.chat_template)

    @property
    def is_chat(self) -> bool:
        """Whether requests become a chat."""
        return self._chat

    def text(self, request: str, prefix: str) -> str:
        """The whole prompt: a chat where there is a template, with the answer's start behind it."""
        if not self._chat:
            return request + prefix
        chat = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": request}], tokenize=False, add_generation_prompt=True
        )
        return chat + prefix.lstrip()

    def ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a prompt; a template has written the special tokens already."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=not self._chat))

    def with_answer(self, text: str, prefix: str, answer: str) -> tuple[tuple[int, ...], int]:
        """Token ids of prompt and answer, and where they part from those of the prompt alone."""
        # A template ends where the answer begins; a text or a prefix ends with a word.
        starts_new = self._chat and not prefix
        joint = "" if starts_new or text[-1:].isspace() or answer[:1].isspace() else " "
        alone, whole = self.ids(text), self.ids(text + joint + answer)
        limit = min(len(alone), len(whole) - 1)
        shared = next((i for i in range(limit) if alone[i] != whole[i]), limit)
        return whole, max(shared, 1)

    def count(self, text: str) -> int:
        """Tokens of a text, without special ones."""
        return len(self._tokenizer.encode(text, add_special_tokens=False))


# An answer that repeats the question's words before it gets to the point.
_SPARE_TOKENS = 16


def made_items(
    task: Task, prompter: Prompter, cells: Sequence[Cell], haystack: Sequence[str]
) -> list[Item]:
    """Items of a task, one for each cell, as long as the cell says.

    Each has as much haystack as fits: one more unit, which is never longer than a needle, would
    pass the length.

    Raises:
        DataError: a length cannot hold the question.
    """
    items, guess = [], task.least_units
    for cell in cells:
        item, guess = _made(task, prompter, cell, haystack, guess)
        items.append(item)
    return items


def _made(
    task: Task, prompter: Prompter, cell: Cell, haystack: Sequence[str], guess: int
) -> tuple[Item, int]:
    def draft(units: int) -> Draft:
        rng = random.Random(cell.seed)  # noqa: S311 (reproducible on purpose)
        return task.draft(Sketch(rng, units, cell.depth, cell.length_tokens, haystack))

    def room(made: Draft) -> int:
        if task.new_tokens is not None:
            return task.new_tokens
        return prompter.count(", ".join(made.references)) + _SPARE_TOKENS

    def length(units: int) -> int:
        made = draft(units)
        return len(prompter.ids(prompter.text(made.request, made.prefix))) + room(made)

    def fits(units: int) -> bool:
        return length(units) <= cell.length_tokens

    # A unit is a token at least: more of them fit only where the haystack has run out.
    units = largest(fits, task.least_units, guess, most=cell.length_tokens)
    if units is None:
        raise DataError(
            f"the length cannot hold an item of {task.name}",
            where="--lengths",
            expected=f"at least {length(task.least_units)} tokens",
            got=f"{cell.length_tokens} tokens",
            next_step="ask for longer items, or leave the task out",
        )
    if units == cell.length_tokens:
        raise DataError(
            f"the text is too short for an item of {task.name}",
            where="--haystack",
            expected=f"enough for {cell.length_tokens} tokens",
            got=f"{length(units)} tokens",
            next_step="give a longer text, or ask for shorter items",
        )
    made = draft(units)
    text = prompter.text(made.request, made.prefix)
    prompt = prompter.ids(text)
    forced, forced_from = prompter.with_answer(text, made.prefix, ", ".join(made.references))
    last = max((text.rfind(sentence) + len(sentence) for sentence in made.evidence), default=0)
    item = Item(
        task=task.name,
        prompt=prompt,
        references=made.references,
        match="all",
        new_tokens=room(made),
        length_tokens=cell.length_tokens,
        depth=cell.depth if task.has_depth else None,
        distance_tokens=len(prompt) - len(prompter.ids(text[:last])) if last else None,
        forced=forced,
        forced_from=forced_from,
    )
    return item, units


def largest(fits: Callable[[int], bool], least: int, guess: int, most: int) -> int | None:
    """The largest number from `least` to `most` that fits, when fewer always fit; None if none.

    Args:
        fits: whether a number fits.
        least, most: the smallest and the largest number allowed.
        guess: where to start looking; near the result, few numbers are tried.
    """
    low, step = max(guess, least), 1
    while not fits(low):
        if low == least:
            return None
        low, step = max(least, low - step), step * 2
    high, step = low + 1, 1
    while high <= most and fits(high):
        low, high, step = high, high + step * 2, step * 2
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
