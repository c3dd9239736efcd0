"""A user's own questions: a JSON Lines file of prompts with answers, or with choices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from converter.calibration.data.sources import read_jsonl
from converter.common.errors import DataError
from converter.evaluation.tasks.item import SPARE_TOKENS, Item, Items, Prompter


def rows_items(path: Path, prompter: Prompter, context_tokens: int, limit: int) -> Items:
    """The first usable rows of a file, as items of the task named like it.

    `answer` is a text, or a list of texts any of which will do. With `choices`, it is the right
    choice or its index, and the choice that the model finds most likely counts.

    Raises:
        DataError: the file is missing, is not JSON Lines, or holds no usable row.
    """
    items: list[Item] = []
    dropped: Counter[str] = Counter()
    for row in read_jsonl(path):
        made = _item(path.stem, row, prompter)
        if isinstance(made, Item) and made.length_tokens > context_tokens:
            made = "longer than the model's context"
        if isinstance(made, str):
            dropped[made] += 1
        elif len(items) < limit:
            items.append(made)
    if not items:
        raise DataError(
            "no row is usable" if dropped else "the data set is empty",
            where=path,
            expected='rows of the form {"prompt", "answer"}, or {"question" or "prompt", '
            f'"choices", "answer"}}, within {context_tokens} tokens',
            got="; ".join(f"{count} {reason}" for reason, count in dropped.items()) or "no rows",
        )
    return Items(tuple(items), dropped)


def _item(task: str, row: Mapping[str, Any], prompter: Prompter) -> Item | str:
    """A row's item, or why it has none."""
    request = row.get("prompt", row.get("question"))
    answer, choices = row.get("answer"), row.get("choices")
    if not isinstance(request, str) or not request.strip():
        return "without a prompt"
    if isinstance(row.get("context"), str):
        request = f"{row['context']}\n\n{request}"
    right: int | None = None
    if choices is None:
        references = [answer] if isinstance(answer, str) else answer
        if not _texts(references):
            return "without an answer"
    else:
        if not _texts(choices) or len(choices) < 2:
            return "with fewer than two choices"
        right = choices.index(answer) if answer in choices else answer
        if type(right) is not int or not 0 <= right < len(choices):
            return "whose answer is none of the choices"
        references = [choices[right]]
    text = prompter.text(request)
    prompt, (forced, forced_from) = prompter.ids(text), prompter.with_answer(text, references[0])
    offered = tuple(prompter.with_answer(text, choice) for choice in choices or ())
    room = max(map(prompter.count, references)) + SPARE_TOKENS
    return Item(
        task=task,
        prompt=prompt,
        references=tuple(references),
        match="part" if choices is None else "choice",
        new_tokens=room,
        length_tokens=max([len(prompt) + room, *(len(ids) for ids, _ in offered)]),
        forced=forced,
        forced_from=forced_from,
        choices=offered,
        right_choice=right,
    )


def _texts(value: object) -> TypeGuard[list[str]]:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(part, str) and part.strip() for part in value)
    )
