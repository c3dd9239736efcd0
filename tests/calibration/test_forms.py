"""The forms that people's rows and files of rows come in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from converter.inference.tokenizer import Tokenizer
from tests.calibration.test_data import PROMPT, chat, load, numbered, only, plain, rows_at

__all__ = ["chat", "plain"]


def said(*turns: str, role: str = "role", content: str = "content") -> list[dict[str, str]]:
    return [{role: turn.partition(":")[0], content: turn.partition(":")[2]} for turn in turns]


@pytest.mark.parametrize(
    ("row", "asked", "answer"),
    [
        ({"prompt": PROMPT, "completion": "Blue."}, PROMPT, "Blue."),
        ({"prompt": PROMPT, "response": "Blue."}, PROMPT, "Blue."),
        ({"instruction": PROMPT, "output": "Blue."}, PROMPT, "Blue."),
        ({"instruction": PROMPT, "input": "", "output": "Blue."}, PROMPT, "Blue."),
        (
            {"instruction": PROMPT, "input": "Look.", "output": "Blue."},
            f"{PROMPT}\n\nLook.",
            "Blue.",
        ),
        (
            {
                "context": "It is blue.",
                "input": PROMPT,
                "answers": ["", "Blue.", "Sky"],
                "length": 4,
            },
            f"It is blue.\n\n{PROMPT}",
            "Blue.",
        ),
        (
            {
                "context": PROMPT,
                "question": "So?",
                "answers": {"text": ["Blue."], "answer_start": [3]},
            },
            f"{PROMPT}\n\nSo?",
            "Blue.",
        ),
        (
            {"prompt": said(f"user:{PROMPT}"), "completion": said("assistant:Blue.")},
            PROMPT,
            "Blue.",
        ),
        (
            {"conversations": said(f"human:{PROMPT}", "gpt:Blue.", role="from", content="value")},
            PROMPT,
            "Blue.",
        ),
    ],
    ids=[
        "TRL",
        "response",
        "Alpaca",
        "no input",
        "input",
        "LongBench",
        "SQuAD",
        "TRL chat",
        "ShareGPT",
    ],
)
def test_the_forms_that_people_have_are_read(
    row: dict[str, Any], asked: str, answer: str, chat: Tokenizer, tmp_path: Path
) -> None:
    assert only(chat, tmp_path, row) == (f"<user>{asked}</><assistant>", answer)


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_rows_may_be_an_array_and_begin_with_a_byte_order_mark(
    ending: str, plain: Tokenizer, tmp_path: Path
) -> None:
    expected = load(plain, rows_at(tmp_path, *numbered(9)))
    path = tmp_path / f"array.{ending}"
    path.write_text(json.dumps(numbered(9), indent=2), encoding="utf-8-sig")
    assert load(plain, path) == expected
    path.write_text(rows_at(tmp_path, *numbered(9)).read_text(), encoding="utf-8-sig")
    assert load(plain, path) == expected


def test_rows_of_mere_text_are_filler_as_a_text_is(plain: Tokenizer, tmp_path: Path) -> None:
    parts = [f"The sea was calm on day {day}. A boat went by. " * 9 for day in range(9)]
    (tmp_path / "sea.md").write_text("\n\n".join(parts))
    data = rows_at(tmp_path, *({"text": part, "id": i} for i, part in enumerate(parts)))
    assert load(plain, data) == load(plain, tmp_path / "sea.md")
    with_answer = rows_at(tmp_path, {"text": "sea"}, {"text": "sea", **numbered(1)[0]})
    assert len(load(plain, with_answer).scored) == 1
