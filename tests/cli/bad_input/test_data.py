"""Calibration data and tokenizers that cannot be used, and memory that does not suffice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.bad_input.conftest import LONG, Refused
from tests.conftest import run_cli

CopyOf = Callable[[str], Path]
ROWS = "rows.jsonl"
CALIBRATE = "calibrate $MODEL --out $HERE/scores.json"


def row(**parts: object) -> str:
    return json.dumps(parts)


def messages(*turns: tuple[str, str]) -> str:
    return row(messages=[{"role": role, "content": content} for role, content in turns])


UNUSABLE = "no example is usable"
# The file, what is in it, and what is said.
UNUSABLE_DATA: tuple[tuple[str, str | bytes | None, *tuple[str, ...]], ...] = (
    ("none.jsonl", None, "no such data", "none.jsonl", "'recall'", ".jsonl"),
    ("rows.csv", "a,b\n", "cannot be read", "rows.csv", ".jsonl, .json, .parquet, .txt or .md"),
    ("rows", "{}\n", "cannot be read", "rows", ".jsonl, .json, .parquet, .txt or .md"),
    (ROWS, row(prompt=LONG, answer="x") + "\n\n{'prompt'\n", "not JSON", "rows.jsonl:3"),
    (ROWS, row(prompt="a", answer="b") + "\n[1]\n", "JSON object", "rows.jsonl:2"),
    (ROWS, "[" * 100_000, "not valid JSON", ROWS),
    (ROWS, "[3]", "JSON object", "rows.jsonl, element 0"),
    (ROWS, '{"answer": ' + "9" * 5000 + "}", "not JSON", "rows.jsonl:1"),
    (ROWS, b"\xff\xfe{}\n", "cannot be read", ROWS, "utf-8"),
    (ROWS, "", UNUSABLE, ROWS, "no rows"),
    (
        ROWS,
        row(prompt=LONG) + "\n" + row(prompt=LONG, answer=" "),
        *(
            UNUSABLE,
            "dropped 1 no answer among its keys: prompt",
            '{"prompt", "answer" or "completion"}',
        ),
    ),
    (ROWS, row(prompt=LONG, answer="\ud800"), UNUSABLE, "dropped 1 ", "Unicode"),
    (ROWS, row(prompt="short", answer="x"), UNUSABLE, "within the window", "lower --window"),
    (ROWS, messages(("user", LONG)), UNUSABLE, "do not end with an assistant's answer"),
    (
        ROWS,
        messages(("user", LONG), ("assistant", "x")),
        *(UNUSABLE, "messages need a tokenizer with a chat template"),
    ),
    ("rows.parquet", b"PAR1", "parquet", "rows.parquet"),
    ("text.txt", "", "no sentences", "words"),
    ("text.txt", b"\xff\xfe", "cannot be read", "text.txt", "utf-8"),
)


@pytest.mark.parametrize("data", UNUSABLE_DATA, ids=lambda data: "-".join(data[2:])[:50])
def test_data_that_cannot_be_used_is_refused(
    data: tuple[str, str | bytes | None, *tuple[str, ...]], refused: Refused, tmp_path: Path
) -> None:
    name, content, *says = data
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(f"calibrate $SOURCE --out $HERE/scores.json --data $HERE/{name}", *says)
    refused(f"convert $SOURCE $HERE/out --data $HERE/{name}", *says)


def test_messages_that_the_chat_template_refuses_are_accounted_for(
    copy_of: CopyOf, refused: Refused, tmp_path: Path
) -> None:
    model = copy_of("qwen3")
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('no system here') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    turns = (("system", LONG), ("user", LONG), ("assistant", "x"))
    (tmp_path / "rows.jsonl").write_text(messages(*turns))
    says = ("no example is usable", "dropped 1 ", "chat template")
    refused(f"{CALIBRATE} --data $HERE/rows.jsonl", *says, MODEL=model)


@pytest.mark.parametrize("content", [None, "{", "{}"], ids=["missing", "not JSON", "no tokenizer"])
def test_a_source_without_a_tokenizer_cannot_be_measured(
    content: str | None, copy_of: CopyOf, refused: Refused
) -> None:
    model = copy_of("qwen3")
    if content is None:
        (model / "tokenizer.json").unlink()
        (model / "tokenizer_config.json").unlink()
    else:
        (model / "tokenizer.json").write_text(content)
    refused(CALIBRATE, "the tokenizer cannot be loaded", "$MODEL", MODEL=model)


def test_a_tokenizer_of_another_model_is_refused(copy_of: CopyOf, refused: Refused) -> None:
    model = copy_of("qwen3")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["e"] = 5000
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    says = ("tokens that the model does not know", "$MODEL", "below 320", "got: 5000")
    refused(CALIBRATE, *says, MODEL=model)


def test_too_little_memory_is_refused_with_how_much_is_enough(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only once the examples are known, so that the work folder is there already."""
    (tmp_path / "rows.jsonl").write_text(row(prompt=LONG, answer="x"))
    out = tmp_path / "scores.json"
    options = ("--data", tmp_path / "rows.jsonl", "--samples", 1, "--method", "nll-restore", "-q")
    command = ("calibrate", sources["qwen3"], "--out", out, *options)
    assert run_cli(*command, "--memory", "1KB") == 2
    printed, err = capsys.readouterr()
    assert printed == ""
    assert err.startswith("error: the model cannot be scored in so little memory")
    for words in ("--memory", "at least", "MiB"):
        assert words in err
    assert not out.exists()
