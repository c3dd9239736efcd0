"""A user's own rows: every form, and what is wrong with the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from converter.common.errors import DataError
from converter.evaluation.tasks.item import Prompter
from converter.evaluation.tasks.rows import rows_items


def rows_file(folder: Path, *rows: object) -> Path:
    path = folder / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


def test_every_form(tmp_path: Path, bytes_prompter: Prompter) -> None:
    path = rows_file(
        tmp_path,
        {"prompt": "Who? Answer:", "answer": "Ann"},
        {"prompt": "Who? Answer:", "answer": ["Ann", "Anna Lee"]},
        {"context": "Ann came.", "question": "Who came?", "answer": "Ann"},
        {"question": "Sky:", "choices": ["green", "blue"], "answer": 1},
        {"question": "Sky:", "choices": ["green", "blue"], "answer": "blue"},
    )
    one, several, context, index, word = rows_items(path, bytes_prompter, 512, 99).items
    assert {item.task for item in (one, several, context, index, word)} == {"mine"}
    assert (one.match, one.references) == ("part", ("Ann",))
    assert several.references == ("Ann", "Anna Lee")
    assert several.new_tokens == len("Anna Lee") + 16
    decode = bytes_prompter.tokenizer.decode  # type: ignore[attr-defined]
    assert decode(context.prompt) == "Ann came.\n\nWho came?"
    assert decode(one.forced[one.forced_from :]) == " Ann"
    assert (index.match, index.right_choice, index.references) == ("choice", 1, ("blue",))
    assert index.choices == word.choices
    assert [decode(ids[begin:]) for ids, begin in index.choices] == [" green", " blue"]
    assert index.right_choice == word.right_choice


def test_the_limit_and_the_order(tmp_path: Path, bytes_prompter: Prompter) -> None:
    rows = [{"prompt": f"{i}?", "answer": f"{i}"} for i in range(9)]
    found = rows_items(rows_file(tmp_path, *rows), bytes_prompter, 512, 4)
    assert [item.references[0] for item in found.items] == ["0", "1", "2", "3"]


def test_unusable_rows_are_counted(tmp_path: Path, bytes_prompter: Prompter) -> None:
    path = rows_file(
        tmp_path,
        {"prompt": "x" * 600, "answer": "y"},
        {"prompt": "fits", "answer": "yes"},
        {"prompt": " ", "answer": "y"},
        {"prompt": "no answer"},
        {"question": "Sky:", "choices": ["blue"], "answer": 0},
        {"question": "Sky:", "choices": ["blue", "green"], "answer": 2},
        {"question": "Sky:", "choices": ["blue", "green"], "answer": True},
    )
    found = rows_items(path, bytes_prompter, 512, 99)
    assert len(found.items) == 1
    assert found.dropped == {
        "longer than the model's context": 1,
        "without a prompt": 1,
        "without an answer": 1,
        "with fewer than two choices": 1,
        "whose answer is none of the choices": 2,
    }


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"\n\n", "the data set is empty"),
        (b'{"prompt": "x"}', "no row is usable"),
        (b"not json", "a line is not JSON"),
        (b"[1]", "not a JSON object"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_files_without_a_row_are_told(
    tmp_path: Path, bytes_prompter: Prompter, content: bytes, word: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as told:
        rows_items(path, bytes_prompter, 512, 9)
    assert word in str(told.value)
