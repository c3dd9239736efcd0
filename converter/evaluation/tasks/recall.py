"""The built-in recall questions as a task by length and depth.

They are made of few and simple words, so that a model with a tiny vocabulary can be asked too.
"""

from __future__ import annotations

from collections.abc import Sequence

from converter.calibration.data.facts import KINDS, SPAN_LENGTH, SPAN_WORDS
from converter.calibration.data.recall import (
    RecallExample,
    base_prompt,
    chat_request,
    recall_examples,
)
from converter.evaluation.tasks.item import Cell, Item, Prompter

RECALL = "recall"
SUMMARY = "facts in filler text, one asked for: a pair, a link, a relation or six words to copy"
# A chat model may say a few words before it gets to the point.
_CHAT_SPARE_TOKENS = 16


def recall_items(prompter: Prompter, cells: Sequence[Cell], text: str | None) -> list[Item]:
    """Recall items, the four kinds in turn, evidence at each cell's depth.

    Args:
        prompter: the tokenizer.
        cells: lengths and depths; cells of one length share the first one's seed.
        text: filler to use in place of the built-in sentences.

    Raises:
        DataError: a length cannot hold the facts and the question.
    """
    words = sorted(SPAN_WORDS, key=lambda word: prompter.count(f" {word}"))[-SPAN_LENGTH:]
    room = prompter.count(" " + " ".join(words)) + _CHAT_SPARE_TOKENS * prompter.is_chat
    empty = RecallExample("", "", "", "pair", 0)
    around = len(prompter.ids(prompter.text(_request(prompter, empty), "")))
    items: list[Item] = []
    for length in dict.fromkeys(cell.length_tokens for cell in cells):
        mine = [cell for cell in cells if cell.length_tokens == length]
        examples = recall_examples(
            prompter.count,
            samples=len(mine),
            length_tokens=length - around - room,
            reach_tokens=0,
            seed=mine[0].seed,
            text=text,
            depths=[cell.depth for cell in mine],
        )
        items += [
            _item(prompter, example, cell, room)
            for example, cell in zip(examples, mine, strict=True)
        ]
    return items


def _request(prompter: Prompter, example: RecallExample) -> str:
    return chat_request(example) if prompter.is_chat else base_prompt(example)


def _item(prompter: Prompter, example: RecallExample, cell: Cell, room: int) -> Item:
    text = prompter.text(_request(prompter, example), "")
    forced, forced_from = prompter.with_answer(text, "", example.answer)
    # A base model goes on with the answer itself: what it says later answers nothing.
    new_tokens = room if prompter.is_chat else len(forced) - forced_from
    return Item(
        task=RECALL,
        prompt=prompter.ids(text),
        references=(example.answer,),
        match="all",
        new_tokens=new_tokens,
        length_tokens=cell.length_tokens,
        depth=cell.depth,
        distance_tokens=example.distance_tokens,
        forced=forced,
        forced_from=forced_from,
    )


def depth_of(index: int, depths: Sequence[float]) -> float:
    """The depth of the index-th item, so that every kind is asked for at every depth."""
    return depths[index // len(KINDS) % len(depths)]
