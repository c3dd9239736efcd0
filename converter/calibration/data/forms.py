"""The forms that people's rows come in, each read as an exchange: messages and their answer.

    {"prompt": ..., "answer" | "completion" | "response": ...}    texts, or lists of messages (TRL)
    {"messages": [{"role": ..., "content": ...}, ...]}             ends with the assistant's answer
    {"conversations": [{"from": ..., "value": ...}, ...]}          the same as ShareGPT has it
    {"instruction": ..., "input": ..., "output": ...}              Alpaca
    {"context": ..., "question" | "input": ..., "answer" | "answers": ...}      SQuAD, LongBench

An answer may be a list of texts any of which is right, as question sets have it; the first counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FORMS = (
    '{"prompt", "answer" or "completion"}, {"messages"}, {"conversations"}, '
    '{"instruction", "output"} or {"context", "question", "answer"}'
)
_ANSWERS = ("answer", "answers", "completion", "response", "output")
_SPEAKERS = {"human": "user", "gpt": "assistant"}
# A row may have any keys; a reason for dropping it names this many, this long.
_KEYS_TOLD, _KEY_LETTERS = 8, 24


@dataclass(frozen=True)
class Exchange:
    """What is asked, and the answer.

    Attributes:
        messages: `role` and `content` of each turn; where `chat` is false, one of the user's.
        chat: the row is a conversation, which needs a chat template.
        about_context: a question below a text, which a base model needs a cue to answer.
    """

    messages: list[dict[str, str]]
    answer: str
    chat: bool = False
    about_context: bool = False


def read_exchange(row: Mapping[str, Any]) -> Exchange | str:
    """A row's exchange, or why it has none."""
    for key in ("messages", "conversations"):
        if isinstance(row.get(key), list):
            return _conversation(row[key])
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation([*prompt, *completion])
    answer = next((text for key in _ANSWERS if (text := _answer(row.get(key)))), None)
    if answer is None:
        return f"no answer among its keys: {_keys(row)}"
    if isinstance(prompt, str):
        return _exchange(prompt, answer)
    instruction, given = row.get("instruction"), row.get("input")
    if isinstance(instruction, str):
        more = f"\n\n{given}" if isinstance(given, str) and given else ""
        return _exchange(instruction + more, answer)
    context, question = row.get("context"), row.get("question", given)
    if isinstance(context, str) and isinstance(question, str):
        return _exchange(f"{context}\n\n{question}", answer, about_context=True)
    return f"nothing asked among its keys: {_keys(row)}"


def _exchange(request: str, answer: str, *, about_context: bool = False) -> Exchange:
    messages = [{"role": "user", "content": request}]
    return Exchange(messages, answer, about_context=about_context)


def _answer(value: object) -> str | None:
    # SQuAD keeps the texts beside where they start.
    if isinstance(value, Mapping):
        value = value.get("text")
    texts = value if isinstance(value, list) else [value]
    return next((text for text in texts if isinstance(text, str) and text.strip()), None)


def _conversation(turns: list[Any]) -> Exchange | str:
    messages = [_message(turn) for turn in turns]
    if len(turns) < 2 or not all(messages) or (messages[-1] or {})["role"] != "assistant":
        return "messages do not end with an assistant's answer"
    told = [message for message in messages if message is not None]
    return Exchange(told[:-1], told[-1]["content"], chat=True)


def _message(turn: object) -> dict[str, str] | None:
    if not isinstance(turn, Mapping):
        return None
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        return None
    return {"role": _SPEAKERS.get(role, role), "content": content}


def _keys(row: Mapping[str, Any]) -> str:
    told = [str(key)[:_KEY_LETTERS] for key in sorted(row, key=str)]
    return ", ".join(told[:_KEYS_TOLD]) + (", ..." if len(told) > _KEYS_TOLD else "")
