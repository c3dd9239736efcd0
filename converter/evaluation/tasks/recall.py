"""The built-in recall questions as a task by length and depth.

They are made of few and simple words, so that a model with a tiny vocabulary can be asked too.
"""

from __future__ import annotations

from collections.abc import Sequence

from converter.calibration.data.facts import SPAN_LENGTH, SPAN_WORDS
from converter.calibration.data.recall import (
    RecallExample,
    base_prompt,
    chat_request,
    recall_examples,
)
from converter.evaluation.tasks.item import SPARE_TOKENS, Item, ItemSpec, Prompter

RECALL = "recall"
SUMMARY = "facts in filler text, one asked for: a pair, a link, a relation or six words to copy"


def recall_items(prompter: Prompter, specs: Sequence[ItemSpec], text: str | None) -> list[Item]:
    """Recall items, the four kinds in turn, evidence at each spec's depth.

    Args:
        prompter: the model's.
        specs: those of one length share the first one's seed.
        text: filler to use in place of the built-in sentences.

    Raises:
        DataError: a length cannot hold the facts and the question.
    """

    def prompt_of(example: RecallExample) -> str:
        return prompter.text(chat_request(example) if prompter.is_chat else base_prompt(example))

    words = sorted(SPAN_WORDS, key=lambda word: prompter.count(f" {word}"))[-SPAN_LENGTH:]
    room = prompter.count(" " + " ".join(words)) + SPARE_TOKENS * prompter.is_chat
    around = len(prompter.ids(prompt_of(RecallExample("", "", "", "pair", 0))))
    items: list[Item] = []
    for length in dict.fromkeys(spec.length_tokens for spec in specs):
        mine = [spec for spec in specs if spec.length_tokens == length]
        examples = recall_examples(
            prompter.count,
            samples=len(mine),
            length_tokens=length - around - room,
            reach_tokens=0,
            seed=mine[0].seed,
            text=text,
            depths=[spec.depth for spec in mine],
        )
        for example, spec in zip(examples, mine, strict=True):
            prompt = prompt_of(example)
            forced, forced_from = prompter.with_answer(prompt, example.answer)
            item = Item(
                task=RECALL,
                prompt=prompter.ids(prompt),
                references=(example.answer,),
                # A base model goes on with the answer itself: what it says later answers nothing.
                new_tokens=room if prompter.is_chat else len(forced) - forced_from,
                length_tokens=length,
                depth=spec.depth,
                distance_tokens=example.distance_tokens,
                forced=forced,
                forced_from=forced_from,
            )
            items.append(item)
    return items
