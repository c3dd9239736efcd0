"""Rows of calibration data as token ids.

Where the tokenizer has a chat template, every form of row becomes a chat. Only answer tokens count.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from converter.calibration.data.forms import read_exchange
from converter.calibration.data.recall import (
    RecallExample,
    base_prompt,
    chat_request,
    with_evidence_last,
)
from converter.common.errors import ChatTemplateError
from converter.inference.example import Example
from converter.inference.tokenizer import Tokenizer, chat_text

Row = Mapping[str, Any] | RecallExample
# The kind of examples from a file without a label.
UNLABELLED = "data"


def tokenized(tokenizer: Tokenizer, row: Row) -> Example | str:
    """A row's example, or why it has none."""
    if isinstance(row, RecallExample):
        return _example(tokenizer, _user(_request(tokenizer, row)), row.answer, row.kind)
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return "text that is not valid Unicode"
    exchange = read_exchange(row)
    if isinstance(exchange, str):
        return exchange
    messages = exchange.messages
    if not tokenizer.chat_template:
        if exchange.chat:
            return "messages need a tokenizer with a chat template"
        if exchange.about_context:
            messages = _user(messages[0]["content"] + "\nAnswer:")
    return _example(tokenizer, messages, exchange.answer, UNLABELLED)


def with_evidence_in_window(
    tokenizer: Tokenizer, row: RecallExample, window_tokens: int
) -> Example | None:
    """The row with its evidence moved next to the question; None where the window is too small."""
    moved = with_evidence_last(row)
    example, request = tokenized(tokenizer, moved), _request(tokenizer, moved)
    before = len(tokenizer.encode(request[: request.rindex(moved.evidence[0])]))
    if isinstance(example, str) or len(example.prompt + example.answer) - before > window_tokens:
        return None
    return example


def tokens_around(tokenizer: Tokenizer) -> int:
    """Tokens that a generated prompt has beside its text: special ones, and those of a chat."""
    special = len(tokenizer.encode(""))
    if not tokenizer.chat_template:
        return special
    chat = chat_text(tokenizer, _user("")) + chat_request(RecallExample("", "", "", "pair", 0))
    return special + len(tokenizer.encode(chat, add_special_tokens=False))


def _user(request: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": request}]


def _request(tokenizer: Tokenizer, row: RecallExample) -> str:
    return chat_request(row) if tokenizer.chat_template else base_prompt(row)


def _example(
    tokenizer: Tokenizer, messages: list[dict[str, str]], answer: str, kind: str
) -> Example | str:
    if tokenizer.chat_template:
        # The template writes the special tokens that the tokenizer would otherwise add.
        try:
            chat = chat_text(tokenizer, messages)
        except ChatTemplateError:
            return "the chat template refuses the messages"
        prompt = tuple(tokenizer.encode(chat, add_special_tokens=False))
        return Example(prompt, tuple(tokenizer.encode(answer, add_special_tokens=False)), kind)
    request = messages[0]["content"]
    joint = "" if request[-1:].isspace() or answer[:1].isspace() or not request else " "
    alone, whole = tokenizer.encode(request), tokenizer.encode(request + joint + answer)
    # The answer begins where the text with it parts from the text without it; a token that spans
    # the border belongs to the answer, which it predicts a part of.
    shared = next(
        (i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b),
        min(len(alone), len(whole)),
    )
    if shared == 0 or shared == len(whole):
        return "no prompt before the answer"
    return Example(tuple(whole[:shared]), tuple(whole[shared:]), kind)
