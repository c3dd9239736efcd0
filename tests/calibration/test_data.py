"""Calibration examples: read, tokenized, filtered, and every row accounted for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converter.calibration.data.examples import (
    Examples,
    fingerprint_of,
    load_examples,
    near_examples,
)
from converter.calibration.data.facts import KINDS
from converter.calibration.data.settings import DataSettings
from converter.common.errors import DataError, SourceError
from converter.inference.example import Example
from converter.inference.tokenizer import Tokenizer, load_tokenizer
from converter.model.mask import Mask
from tests.conftest import make_tokenizer, shared

CONTEXT, LAYERS, MASK = 512, 4, Mask(16, 2)
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPT = "What is the colour of the sky?"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer of one token a byte, without a chat template."""
    folder = tmp_path_factory.mktemp("plain")
    make_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The same with a chat template, which refuses system messages."""
    folder = tmp_path_factory.mktemp("chat")
    make_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return load_tokenizer(folder)


def asking(data: object, **changes: Any) -> DataSettings:
    return replace(DataSettings(str(data), 8, 0, 0, 480, 1, 50, 0), **changes)


def rows_at(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def load(tokenizer: Tokenizer, data: object, **changes: Any) -> Examples:
    return load_examples(tokenizer, asking(data, **changes), MASK, LAYERS, CONTEXT)


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids))


def only(tokenizer: Tokenizer, folder: Path, row: dict[str, Any]) -> tuple[str, str]:
    """The texts of the prompt and the answer that one row becomes."""
    (example,) = load(tokenizer, rows_at(folder, row)).scored
    return text_of(tokenizer, example.prompt), text_of(tokenizer, example.answer)


QUESTION = {"context": "The sky is blue.", "question": "What colour?", "answer": "Blue."}
MESSAGES = [
    {"role": "user", "content": PROMPT},
    {"role": "assistant", "content": "Blue?"},
    {"role": "user", "content": "Yes."},
    {"role": "assistant", "content": "Blue."},
]


def test_every_form_of_row_becomes_a_text_without_a_template(
    plain: Tokenizer, tmp_path: Path
) -> None:
    for end, joint in (("", " "), ("\n", "")):
        row = {"prompt": PROMPT + end, "answer": "Blue."}
        assert only(plain, tmp_path, row) == (PROMPT + end, f"{joint}Blue.")
    asked = "The sky is blue.\n\nWhat colour?\nAnswer:"
    assert only(plain, tmp_path, QUESTION) == (asked, " Blue.")


def test_every_form_of_row_becomes_a_chat_with_a_template(chat: Tokenizer, tmp_path: Path) -> None:
    asked = f"<user>{PROMPT}</><assistant>"
    assert only(chat, tmp_path, {"prompt": PROMPT, "answer": "Blue."}) == (asked, "Blue.")
    assert only(chat, tmp_path, {"messages": MESSAGES[:2]}) == (asked, "Blue?")
    talk = f"{asked}Blue?</><user>Yes.</><assistant>"
    assert only(chat, tmp_path, {"messages": MESSAGES}) == (talk, "Blue.")
    asked = "<user>The sky is blue.\n\nWhat colour?</><assistant>"
    assert only(chat, tmp_path, QUESTION) == (asked, "Blue.")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=st.text(st.characters(exclude_categories=["Cs"]), min_size=20, max_size=80),
    answer=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=10),
)
def test_prompt_and_answer_together_are_the_whole_text(
    plain: Any, tmp_path: Path, prompt: str, answer: str
) -> None:
    data = rows_at(tmp_path, {"prompt": prompt, "answer": answer})
    try:
        (example,) = load(plain, data, max_answer_tokens=500).scored
    except DataError:
        assert not answer.strip()
        return
    whole = example.prompt + example.answer
    assert list(whole) in (plain.encode(prompt + answer), plain.encode(f"{prompt} {answer}"))
    assert text_of(plain, example.prompt) == prompt


def test_a_token_that_spans_the_border_belongs_to_the_answer(tmp_path: Path) -> None:
    tokenizer: Any = load_tokenizer(shared("tokenizers/gpt2"))
    prompt = "The quick brown fox jumps over the lazy dog again and again and again, says the "
    data = rows_at(tmp_path, {"prompt": prompt, "answer": "teacher"})
    (example,) = load_examples(tokenizer, asking(data), Mask(4), LAYERS, CONTEXT).scored
    assert list(example.prompt + example.answer) == tokenizer.encode(prompt + "teacher")
    assert text_of(tokenizer, example.answer) == " teacher"
    assert text_of(tokenizer, example.prompt) == prompt.rstrip()


def test_a_real_chat_template_is_followed(tmp_path: Path) -> None:
    tokenizer: Any = load_tokenizer(shared("tokenizers/qwen3"))
    data = rows_at(tmp_path, {"messages": MESSAGES})
    (example,) = load_examples(tokenizer, asking(data), Mask(4), LAYERS, CONTEXT).scored
    rendered = tokenizer.apply_chat_template(
        MESSAGES[:-1], tokenize=False, add_generation_prompt=True
    )
    assert text_of(tokenizer, example.prompt) == rendered
    assert text_of(tokenizer, example.answer) == "Blue."


def of_size(prompt: int, answer: int) -> dict[str, str]:
    """A row whose prompt and answer have so many tokens in the plain tokenizer."""
    return {"prompt": "p" * prompt, "answer": "a" * (answer - 1)}


@pytest.mark.parametrize(
    ("prompt", "answer", "reason"),
    [
        (19, 4, None),
        (18, 4, "prompt within the window, where sliding changes nothing"),
        (480, 4, None),
        (481, 4, "prompt longer than --length"),
        (472, 40, None),
        (473, 40, "prompt and answer longer than the model's context"),
        (100, 3, None),
        (100, 2, "answer shorter than --min-answer"),
        (100, 50, None),
        (100, 51, "answer longer than --max-answer"),
    ],
)
def test_a_row_is_kept_or_dropped_for_its_size(
    prompt: int, answer: int, reason: str | None, plain: Tokenizer, tmp_path: Path
) -> None:
    data = rows_at(tmp_path, of_size(prompt, answer), of_size(60, 5))
    examples = load(plain, data, min_answer_tokens=3)
    sizes = {(len(example.prompt), len(example.answer)) for example in examples.scored}
    assert sizes == {(60, 5)} | (set() if reason else {(prompt, answer)})
    assert (examples.looked_at, examples.dropped) == (2, {reason: 1} if reason else {})


BAD_ROWS: dict[str, list[dict[str, Any]]] = {
    "no answer among its keys: prompt": [{"prompt": PROMPT}],
    "no answer among its keys: answer, prompt": [
        {"prompt": PROMPT, "answer": answer} for answer in ("  ", 4, [], {"text": [3]})
    ],
    "nothing asked among its keys: answer": [{"answer": "b"}],
    "nothing asked among its keys: answer, context": [{"answer": "b", "context": PROMPT}],
    "nothing asked among its keys: answer, prompt": [{"answer": "b", "prompt": ["a"]}],
    "no answer among its keys: a, b, c, d, e, f, g, h, ...": [dict.fromkeys("hgfedcbai", PROMPT)],
    "messages do not end with an assistant's answer": [
        {"messages": messages} for messages in (MESSAGES[:1], MESSAGES[:3], [], [3, 4])
    ],
    "text that is not valid Unicode": [{"prompt": PROMPT, "answer": "\ud800"}],
    "the chat template refuses the messages": [
        {"messages": [{"role": "system", "content": "Be brief."}, *MESSAGES]}
    ],
}


def test_rows_that_cannot_be_used_are_counted_by_reason(chat: Tokenizer, tmp_path: Path) -> None:
    good = {"prompt": PROMPT, "answer": "Blue."}
    rows = [good, *(row for bad in BAD_ROWS.values() for row in bad)]
    examples = load(chat, rows_at(tmp_path, *rows))
    assert examples.dropped == {reason: len(bad) for reason, bad in BAD_ROWS.items()}
    assert list(examples.dropped.values()) == sorted(examples.dropped.values(), reverse=True)
    assert (examples.looked_at, examples.asked) == (len(rows), (8, 0, 0))
    assert [text_of(chat, example.answer) for example in examples.scored] == ["Blue."]


def numbered(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{number:03} {PROMPT}", "answer": "Blue."} for number in range(count)]


@pytest.mark.parametrize(("rows", "held_out"), [(20, 7), (6, 1)])
def test_examples_are_split_without_overlap_and_the_held_out_fall_short(
    rows: int, held_out: int, plain: Tokenizer, tmp_path: Path
) -> None:
    examples = load(plain, rows_at(tmp_path, *numbered(rows)), samples=5, holdout=7)
    assert (len(examples.scored), len(examples.held_out)) == (5, held_out)
    assert len({example.prompt for example in examples.all}) == 5 + held_out
    assert (examples.looked_at, examples.asked) == (5 + held_out, (5, 0, 7))


def test_validation_beyond_what_is_scored_falls_short_first(
    plain: Tokenizer, tmp_path: Path
) -> None:
    rows = rows_at(tmp_path, *numbered(20))
    for samples, parts in ((5, (5, 8, 7)), (8, (8, 8, 4))):
        found = load(plain, rows, samples=samples, validation=20, holdout=7)
        assert tuple(map(len, (found.scored, found.validation, found.held_out))) == parts


def test_a_choice_on_a_few_examples_is_refused_unless_asked_for(
    plain: Tokenizer, tmp_path: Path
) -> None:
    long = [{"prompt": "p" * 600, "answer": "Blue."}] * 392
    data = rows_at(tmp_path, *numbered(8), *long)
    with pytest.raises(DataError, match="too few examples remain") as caught:
        load(plain, data, samples=64, validation=64, holdout=32)
    told = caught.value.details
    assert told["got"] == "4, of 400 rows: dropped 392 prompt longer than --length"
    assert told["next step"].startswith("raise --length; ")
    assert told["next step"].endswith("--samples 4 --validation 4")
    few = load(plain, data, samples=4, validation=4, holdout=32)
    assert (len(few.scored), len(few.validation), len(few.held_out)) == (4, 4, 0)


@pytest.mark.parametrize("source", ["rows", "recall", "rows.jsonl,recall"])
def test_the_seed_alone_decides_which_examples_are_scored(
    source: str, plain: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = rows_at(tmp_path, *numbered(30))
    monkeypatch.chdir(tmp_path)
    source = str(data) if source == "rows" else source
    first, again, other = (load(plain, source, seed=seed).scored for seed in (1, 1, 2))
    assert first == again != other
    assert load(plain, source, seed=1, holdout=4).scored == first


def test_lines_end_where_json_lines_end(plain: Tokenizer, tmp_path: Path) -> None:
    """Unicode knows more line ends; inside a JSON string they are letters like any other."""
    path = tmp_path / "rows.jsonl"
    letters = "\u2028\u2029\x85"
    rows = [json.dumps(row, ensure_ascii=False) for row in numbered(2)]
    rows[0] = rows[0].replace("What", letters)
    path.write_bytes(("\r\n".join(rows) + "\r\n\r\n").encode())
    examples = load(plain, path)
    assert (examples.looked_at, examples.dropped) == (2, {})
    assert any(letters in text_of(plain, example.prompt) for example in examples.scored)


def test_parquet_rows_are_the_same_as_json_rows(plain: Tokenizer, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = numbered(12)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert load(plain, tmp_path / "rows.parquet") == load(plain, rows_at(tmp_path, *rows))


@pytest.mark.parametrize("kind", ["recall", "text"])
def test_generated_examples_fit_what_was_asked_for(
    kind: str, plain: Tokenizer, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The sea was calm. A boat went by. Nobody spoke for a while. " * 40)
    examples = load(plain, "recall" if kind == "recall" else text, samples=8, holdout=4)
    assert (len(examples.scored), len(examples.held_out)) == (8, 4)
    assert (examples.looked_at, examples.dropped) == (12, {})
    assert {example.kind for example in examples.scored} == set(KINDS)
    for example in examples.scored + examples.held_out:
        assert 400 < len(example.prompt) <= 480
        answer = text_of(plain, example.answer)
        assert answer.startswith(" ")
        # Every word of the answer stands somewhere in the prompt: it can be recalled.
        assert all(word in text_of(plain, example.prompt) for word in answer.split())


def test_generated_chats_fit_what_was_asked_for(chat: Tokenizer) -> None:
    examples = load_examples(chat, asking("recall", length_tokens=800), MASK, LAYERS, 1024)
    assert len(examples.scored) == 8
    for example in examples.scored:
        assert 700 < len(example.prompt) <= 800
        prompt = text_of(chat, example.prompt)
        assert prompt.startswith("<user>") and prompt.endswith("</><assistant>")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("rows.JSONL", "{}", "cannot be read"),
        # A line of JSON ends where its file's line ends, and nowhere else.
        ("rows.jsonl", '{"prompt": "\u2028"}\n\n{"prompt": }\n', "rows.jsonl:3"),
        ("text.txt", " \n ", "no sentences"),
    ],
)
def test_data_that_cannot_be_used_is_refused(
    name: str, content: str, problem: str, plain: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=problem):
        load(plain, tmp_path / name)


def test_a_fingerprint_tells_examples_apart() -> None:
    first = [Example((1, 2), (3,), "data"), Example((4,), (5,), "data")]
    assert fingerprint_of(first) == fingerprint_of(list(first))
    changed = [[Example(*ids, "data"), first[1]] for ids in (((1,), (2, 3)), ((1, 2), (9,)))]
    for other in (first[:1], first[::-1], *changed):
        assert fingerprint_of(other) != fingerprint_of(first)


NO_VOCABULARY = '{"version": "1.0", "model": {"type": "BPE"}}'
NO_SUCH_MERGE = NO_VOCABULARY.replace("}}", ', "vocab": {"a": 0}, "merges": ["x y"]}}')


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        *(
            ("tokenizer.json", text, "tokenizer cannot be loaded")
            for text in ("", "{", "[]", '{"model": {}}', NO_VOCABULARY, NO_SUCH_MERGE)
        ),
        ("chat_template.jinja", "{% for %}", "chat template cannot be used"),
        ("chat_template.jinja", "{{ raise_exception('never') }}", "chat template cannot be used"),
    ],
)
def test_a_damaged_tokenizer_is_refused(file: str, text: str, problem: str, tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(SourceError, match=problem):
        load_tokenizer(tmp_path)


FAR = Mask(200, 2)


def near(tokenizer: Tokenizer, data: object, mask: Mask, **changes: Any) -> dict[int, Example]:
    settings = asking(data, length_tokens=900, **changes)
    return near_examples(tokenizer, load_examples(tokenizer, settings, mask, LAYERS, 1024), mask)


@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_moved_evidence_lies_in_the_window_of_the_answer(
    kind: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    settings = asking("recall", length_tokens=900)
    far = load_examples(tokenizer, settings, FAR, LAYERS, 1024).scored
    moved = near(tokenizer, "recall", FAR)
    assert moved.keys() == set(range(len(far)))
    for index, example in moved.items():
        before = far[index]
        assert (example.answer, example.kind) == (before.answer, before.kind)
        # The same words in another order.
        words = [sorted(text_of(tokenizer, e.prompt).split()) for e in (example, before)]
        assert words[0] == words[1]
        # All that moved, and the answer, fits into the window of the last row.
        same = [a == b for a, b in zip(example.prompt, before.prompt, strict=True)]
        assert same.index(False) < len(example.prompt) - 20


def test_evidence_that_the_window_cannot_hold_is_not_moved(plain: Tokenizer) -> None:
    assert near(plain, "recall", Mask(8)) == {}
    some = near(plain, "recall", Mask(110))
    assert some.keys() <= near(plain, "recall", FAR).keys()
