"""Calibration examples: read from the user's file or generated, tokenized, filtered, accounted for.

A row of a data file has one of these forms:

    {"prompt": ..., "answer": ...}
    {"messages": [{"role": ..., "content": ...}, ...]}   the last one is the assistant's answer
    {"context": ..., "question": ..., "answer": ...}

Where the tokenizer has a chat template, every form becomes a chat. Only answer tokens count.

Several sets take turns, each read, filtered and accounted for by itself.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from converter.calibration.data.recall import (
    KINDS,
    RecallExample,
    base_prompt,
    chat_request,
    recall_examples,
    with_evidence_last,
)
from converter.calibration.data.sets import BUILT_IN, DataSet, data_sets, in_turn, shares
from converter.common.errors import DataError
from converter.inference.example import Example
from converter.inference.tokenizer import Tokenizer, chat_text
from converter.model.mask import Mask

_Row = Mapping[str, Any] | RecallExample
# Far from the seeds of the other lots.
_VALIDATION_SEEDS = 1 << 40
_FORMS = '{"prompt", "answer"}, {"messages"} or {"context", "question", "answer"}'


_UNLABELLED = "data"


@dataclass(frozen=True)
class DataSettings:
    """Which examples to take.

    Attributes:
        data: `recall` for the built-in generator, a .txt file for the generator over that text, or
            a .jsonl or .parquet file of rows; or several of them with labels, as `data_sets` reads.
        samples: examples to score, shared out between the sets.
        validation: further examples, on which choices are held against each other.
        holdout: still further examples, kept apart to report the quality of the chosen plan; both
            shared out in the same way.
        length_tokens: the longest prompt; generated prompts have this length.
        min_answer_tokens, max_answer_tokens: answers outside are dropped.
        seed: of the generator and of the order in which rows are taken.
    """

    data: str
    samples: int
    validation: int
    holdout: int
    length_tokens: int
    min_answer_tokens: int
    max_answer_tokens: int
    seed: int


@dataclass(frozen=True)
class Examples:
    """What calibration runs on.

    Attributes:
        scored: examples that layers are scored on; those of several sets in turn.
        validation: examples on which choices of layers are held against each other.
        held_out: examples that neither was done on, for the quality report.
        account: how many rows were looked at, kept and dropped for which reason.
        sets: each set's own examples by its name, where there are several.
    """

    scored: tuple[Example, ...]
    validation: tuple[Example, ...]
    held_out: tuple[Example, ...]
    account: Mapping[str, int]
    sets: Mapping[str, Examples] = field(default_factory=dict)

    @property
    def all(self) -> tuple[Example, ...]:
        """Every one of them."""
        return (*self.scored, *self.validation, *self.held_out)


def fingerprint_of(examples: Sequence[Example]) -> str:
    """A hash over the examples' token ids and their labels."""
    # Kinds that are no labels follow from where the tokens come from.
    given = [() if e.kind in (_UNLABELLED, *KINDS) else (e.kind,) for e in examples]
    ids = [[e.prompt, e.answer, *label] for e, label in zip(examples, given, strict=True)]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def load_examples(
    tokenizer: Tokenizer, settings: DataSettings, mask: Mask, layers: int, context_tokens: int
) -> Examples:
    """Read or generate examples, keep those that can tell layers apart, and say what was dropped.

    Raises:
        DataError: a file is missing or malformed, or too few rows of a set are usable.
    """
    loaded: dict[str, Examples] = {}
    parts = _own_settings(settings)
    for data, own in parts:
        examples = _load_set(tokenizer, data, own, mask, layers, context_tokens)
        if len(parts) == 1:
            return examples
        account = dict(examples.account)
        if short := own.samples + own.validation + own.holdout - account["kept"]:
            account["missing from its share"] = short
        loaded[data.name] = replace(examples, account=account)
    sets = list(loaded.values())
    totals: Counter[str] = Counter()
    for part in sets:
        totals.update(part.account)
    return Examples(
        _taking_turns([part.scored for part in sets]),
        _taking_turns([part.validation for part in sets]),
        _taking_turns([part.held_out for part in sets]),
        dict(totals),
        loaded,
    )


def _own_settings(settings: DataSettings) -> list[tuple[DataSet, DataSettings]]:
    """Every set with the settings of its share."""
    sets = data_sets(settings.data)
    if settings.samples < len(sets):
        raise DataError(
            "there are more data sets than examples to score",
            where="--samples",
            expected=f"at least {len(sets)}, one for each set",
            got=settings.samples,
        )
    totals = settings.samples, settings.validation, settings.holdout
    parts = (shares(total, len(sets)) for total in totals)
    return [
        (data, replace(settings, samples=samples, validation=validation, holdout=holdout))
        for data, samples, validation, holdout in zip(sets, *parts, strict=True)
    ]


def _taking_turns(parts: Sequence[Sequence[Example]]) -> tuple[Example, ...]:
    return tuple(parts[index][place] for place, index in in_turn([len(part) for part in parts]))


def _load_set(
    tokenizer: Tokenizer,
    data: DataSet,
    settings: DataSettings,
    mask: Mask,
    layers: int,
    context_tokens: int,
) -> Examples:
    """One set's examples."""
    account: Counter[str] = Counter()
    usable = _usable(tokenizer, data, settings, mask, layers, context_tokens, account)
    border = settings.samples + settings.validation
    kept = [example for _, example in islice(usable, border + settings.holdout)]
    account["kept"] = len(kept)
    # What is short is the held-out set, and then scoring and validation in proportion; the account
    # shows it.
    border = min(border, len(kept))
    first = -(-border * settings.samples // (settings.samples + settings.validation))
    scored, validation, held_out = kept[:first], kept[first:border], kept[border:]
    if not scored:
        raise DataError(
            "no example is usable",
            where=data,
            expected=f"rows of the form {_FORMS}, with a prompt of {_shortest(mask)} to "
            f"{settings.length_tokens} tokens",
            got="; ".join(f"{count} {what}" for what, count in account.items())
            if account["looked at"]
            else "no rows",
            next_step="change --length, --min-answer or --window, or give other --data",
        )
    return Examples(tuple(scored), tuple(validation), tuple(held_out), dict(account))


def _usable(
    tokenizer: Tokenizer,
    data: DataSet,
    settings: DataSettings,
    mask: Mask,
    layers: int,
    context_tokens: int,
    account: Counter[str],
) -> Iterator[tuple[_Row, Example]]:
    """A set's rows that can tell layers apart, as examples; the account counts all looked at."""
    for row in _rows(tokenizer, data, settings, mask, layers):
        account["looked at"] += 1
        example = _tokenized(tokenizer, row)
        reason = (
            example
            if isinstance(example, str)
            else _why_dropped(example, settings, mask, context_tokens)
        )
        if reason is None and isinstance(example, Example):
            yield row, example if data.label is None else replace(example, kind=data.label)
        else:
            account[f"dropped: {reason}"] += 1


def near_examples(
    tokenizer: Tokenizer, settings: DataSettings, mask: Mask, layers: int, context_tokens: int
) -> dict[int, Example]:
    """Generated examples with their evidence moved into the window of the answer.

    Returns:
        Examples by the place of the one they were made from among those that are scored; none for
        evidence that the window cannot hold together with the question, or for the user's rows.
    """
    sets = _own_settings(settings)
    if not any(data.generated for data, _ in sets):
        return {}
    scored = [
        list(
            islice(
                _usable(tokenizer, data, own, mask, layers, context_tokens, Counter()), own.samples
            )
        )
        for data, own in sets
    ]
    near: dict[int, Example] = {}
    for position, (place, index) in enumerate(in_turn([len(part) for part in scored])):
        row, example = scored[index][place]
        moved = _evidence_moved(tokenizer, row, mask) if isinstance(row, RecallExample) else None
        if moved is not None:
            near[position] = replace(moved, kind=example.kind)
    return near


def _evidence_moved(tokenizer: Tokenizer, row: RecallExample, mask: Mask) -> Example | None:
    """The row with its evidence moved next to the question; None where the window is too small."""
    moved = with_evidence_last(row)
    example = _tokenized(tokenizer, moved)
    if isinstance(example, str):
        return None
    request = chat_request(moved) if tokenizer.chat_template else base_prompt(moved)
    before = len(tokenizer.encode(request[: request.rindex(moved.evidence[0])]))
    fits = len(example.prompt) + len(example.answer) - before <= mask.window_tokens
    return example if fits else None


def _shortest(mask: Mask) -> int:
    return mask.window_tokens + mask.sink_tokens + 1


def _why_dropped(
    example: Example, settings: DataSettings, mask: Mask, context_tokens: int
) -> str | None:
    prompt, answer = len(example.prompt), len(example.answer)
    if prompt > settings.length_tokens:
        return "prompt longer than --length"
    if prompt + answer > context_tokens:
        return "prompt and answer longer than the model's context"
    if prompt < _shortest(mask):
        return "prompt within the window, where sliding changes nothing"
    if answer < settings.min_answer_tokens:
        return "answer shorter than --min-answer"
    if answer > settings.max_answer_tokens:
        return "answer longer than --max-answer"
    return None


def _rows(
    tokenizer: Tokenizer, data: DataSet, settings: DataSettings, mask: Mask, layers: int
) -> Iterator[_Row]:
    """Rows in the order they are tried: generated ones as made, a file's in a seeded shuffle."""
    path = Path(data.source)
    if data.generated:
        special = len(tokenizer.encode("")) + _chat_overhead(tokenizer)
        # Lots of their own, so that none depends on how large another is.
        lots = (
            (settings.samples, 2 * settings.seed),
            (settings.validation, _VALIDATION_SEEDS + settings.seed),
            (settings.holdout, 2 * settings.seed + 1),
        )
        for samples, seed in lots:
            yield from recall_examples(
                lambda text: len(tokenizer.encode(text, add_special_tokens=False)),
                samples=samples,
                length_tokens=settings.length_tokens - special,
                reach_tokens=layers * mask.window_tokens + mask.sink_tokens,
                seed=seed,
                text=None if data.source == BUILT_IN else _read_text(path),
            )
        return
    rows = {".jsonl": read_jsonl, ".parquet": _read_parquet}[path.suffix](path)
    random.Random(settings.seed).shuffle(rows)  # noqa: S311 - a reproducible order, not a secret
    yield from rows


def _chat_overhead(tokenizer: Tokenizer) -> int:
    """Tokens that a chat adds around a generated prompt."""
    if not tokenizer.chat_template:
        return 0
    empty = chat_text(tokenizer, [{"role": "user", "content": ""}])
    request = chat_request(RecallExample("", "", "", "pair", 0, False))
    return len(tokenizer.encode(empty + request, add_special_tokens=False))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError("a text cannot be read", where=path, got=error.strerror) from error
    except UnicodeDecodeError as error:
        raise DataError(
            "a text cannot be read", where=path, expected="UTF-8", got=f"not UTF-8 ({error})"
        ) from error


def read_jsonl(path: Path) -> list[Mapping[str, Any]]:
    """The objects of a JSON Lines file, empty lines left out.

    Raises:
        DataError: the file cannot be read, or a line is no JSON object; it names the line.
    """
    rows: list[Mapping[str, Any]] = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError("a line is not JSON", where=f"{path}:{number}", got=error) from error
        if not isinstance(row, dict):
            raise DataError("a line is not a JSON object", where=f"{path}:{number}")
        rows.append(row)
    return rows


def _read_parquet(path: Path) -> list[Mapping[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            "reading parquet needs pyarrow",
            where=path,
            next_step='pip install "hybridize[parquet]"',
        ) from error
    try:
        rows: list[Mapping[str, Any]] = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError("a parquet file cannot be read", where=path, got=error) from error
    return rows


def _tokenized(tokenizer: Tokenizer, row: _Row) -> Example | str:
    """A row's example, or why it has none."""
    if isinstance(row, RecallExample):
        request = chat_request(row) if tokenizer.chat_template else base_prompt(row)
        return _pair(tokenizer, [{"role": "user", "content": request}], row.answer, row.kind)
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return "text that is not valid Unicode"
    messages = row.get("messages")
    if isinstance(messages, list):
        return _conversation(tokenizer, messages)
    answer = row.get("answer")
    if not isinstance(answer, str) or not answer.strip():
        return "no answer"
    if isinstance(row.get("prompt"), str):
        request = row["prompt"]
    elif isinstance(row.get("context"), str) and isinstance(row.get("question"), str):
        request = f"{row['context']}\n\n{row['question']}"
        if not tokenizer.chat_template:
            request += "\nAnswer:"
    else:
        return "no prompt, messages, or context and question"
    return _pair(tokenizer, [{"role": "user", "content": request}], answer, _UNLABELLED)


def _conversation(tokenizer: Tokenizer, messages: list[Any]) -> Example | str:
    fits = all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    if not fits or len(messages) < 2 or messages[-1]["role"] != "assistant":
        return "messages do not end with an assistant's answer"
    if not tokenizer.chat_template:
        return "messages need a tokenizer with a chat template"
    turns = [{"role": m["role"], "content": m["content"]} for m in messages]
    return _pair(tokenizer, turns[:-1], turns[-1]["content"], _UNLABELLED)


def _pair(
    tokenizer: Tokenizer, messages: list[dict[str, str]], answer: str, kind: str
) -> Example | str:
    if tokenizer.chat_template:
        # The template writes the special tokens that the tokenizer would otherwise add.
        try:
            chat = chat_text(tokenizer, messages)
        except TemplateError:
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
