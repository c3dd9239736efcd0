"""Several labelled sets of calibration data, shared out, in turn, each accounted for by itself."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.calibration.data.examples import (
    Examples,
    fingerprint_of,
    in_turn,
    load_examples,
    near_examples,
    shares,
)
from converter.calibration.data.facts import KINDS
from converter.calibration.data.sources import DataSet, data_sets
from converter.cli.console import Console
from converter.cli.tables import say_counts
from converter.common.errors import DataError
from converter.inference.example import Example
from converter.inference.tokenizer import Tokenizer
from converter.model.mask import Mask
from tests.calibration import test_data
from tests.calibration.test_data import LAYERS, asking, numbered, plain

__all__ = ["plain"]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with three sets of 30 rows that name their set, and a text."""
    for name in ("chat", "code", "a=b,c"):
        write(tmp_path / f"{name}.jsonl", rows(name, 30))
    (tmp_path / "rows.csv").touch()
    (tmp_path / "sea.txt").write_text("The sea was calm. A boat went by. Nobody spoke. " * 40)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(name: str, count: int) -> list[dict[str, str]]:
    asked = "What is the colour of the sky?"
    return [{"prompt": f"{n:03} {name} {asked}", "answer": "Blue."} for n in range(count)]


def write(path: Path, lines: Sequence[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def load(tokenizer: Tokenizer, data: str, **changes: Any) -> Examples:
    return test_data.load(tokenizer, data, **{"holdout": 4, **changes})


def kinds(examples: Sequence[Example]) -> list[str]:
    return [example.kind for example in examples]


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("text", "sets"),
    [
        ("recall", [("recall", None)]),
        ("chat.jsonl", [("chat.jsonl", None)]),
        ("a=b,c.jsonl", [("a=b,c.jsonl", None)]),
        ("talk=chat.jsonl", [("chat.jsonl", "talk")]),
        ("mine=recall", [("recall", "mine")]),
        (
            "talk=chat.jsonl, code.jsonl ,recall",
            [("chat.jsonl", "talk"), ("code.jsonl", "code"), ("recall", None)],
        ),
        ("recall,sea.txt", [("recall", None), ("sea.txt", "sea")]),
    ],
)
def test_sets_are_read_from_one_text(text: str, sets: list[tuple[str, str | None]]) -> None:
    assert data_sets(text) == tuple(DataSet(source, label) for source, label in sets)


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ["no such data"]),
        ("none.jsonl", ["no such data", "none.jsonl", "'recall'"]),
        ("chat.jsonl,talk=none.jsonl", ["no such data", "where: talk=none.jsonl"]),
        ("x" * 5000 + ",recall", ["no such data"]),
        ("chat.jsonl,rows.csv", ["cannot be read", "where: rows=rows.csv"]),
        ("chat.jsonl,", ["no source", "--data", "LABEL=FILE", "got: ''"]),
        ("talk=", ["no source", "got: 'talk='"]),
        ("=chat.jsonl", ["no label", "got: '=chat.jsonl'"]),
        ("talk=chat.jsonl,talk=code.jsonl", ["same label", "LABEL=FILE", "talk=code.jsonl"]),
        ("recall,recall", ["same label"]),
        ("recall=chat.jsonl,recall", ["same label"]),
        ("one=chat.jsonl,two=./chat.jsonl", ["same source", "two=./chat.jsonl"]),
        ("one=recall,recall", ["same source"]),
        ("span=chat.jsonl", ["name of a kind", "pair, link, relation, span", "my-span=chat.jsonl"]),
    ],
)
def test_sets_that_cannot_be_told_apart_or_found_are_refused(text: str, says: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        data_sets(text)
    assert [words for words in says if words not in str(caught.value)] == []


def test_a_set_without_a_usable_row_is_named(files: Path, plain: Tokenizer) -> None:
    write(files / "short.jsonl", [{"prompt": "Hm?", "answer": "No."}] * 3)
    with pytest.raises(DataError, match="no example is usable") as caught:
        load(plain, "chat.jsonl,brief=short.jsonl")
    assert caught.value.details["where"] == "brief=short.jsonl"


@given(st.integers(0, 200), st.integers(1, 9))
def test_shares_are_even_and_the_first_take_the_rest(total: int, sets: int) -> None:
    found = shares(total, sets)
    assert (sum(found), len(found)) == (total, sets)
    assert found == sorted(found, reverse=True)
    assert found[0] - found[-1] <= 1


@given(st.lists(st.integers(0, 12), min_size=1, max_size=6))
def test_every_beginning_holds_as_many_of_each_set(sizes: list[int]) -> None:
    order = in_turn(sizes)
    seen: Counter[int] = Counter()
    for index, of in order:
        assert index == seen[of], "a set's own order is kept"
        seen[of] += 1
        unfinished = [seen[i] for i, size in enumerate(sizes) if seen[i] < size]
        if unfinished:
            assert max(seen.values()) - min(unfinished) <= 1
    assert [seen[i] for i in range(len(sizes))] == sizes


@pytest.mark.usefixtures("files")
def test_every_set_has_its_share_in_turn(plain: Tokenizer) -> None:
    examples = load(plain, "talk=chat.jsonl,code.jsonl,recall", samples=11, holdout=7)
    built_in = ["pair", "link", "relation"]
    turns = [kind for third in built_in for kind in ("talk", "code", third)]
    assert kinds(examples.scored) == [*turns, "talk", "code"]
    # The recall questions that are held out are a split of their own: pairs come first again.
    assert kinds(examples.held_out) == ["talk", "code", "pair", "talk", "code", "link", "talk"]


@pytest.mark.usefixtures("files")
def test_a_set_gives_what_it_gives_alone(plain: Tokenizer) -> None:
    """Each is read, filtered, shuffled and held out as a single source of its share would be."""
    together = load(plain, "talk=chat.jsonl,code.jsonl,recall", samples=8, holdout=4)
    alone = {
        "talk": load(plain, "chat.jsonl", samples=3, holdout=2),
        "code": load(plain, "code.jsonl", samples=3, holdout=1),
        "recall": load(plain, "recall", samples=2, holdout=1),
    }
    assert list(together.sets) == list(alone)
    for name, single in alone.items():
        own = together.sets[name]
        assert (own.looked_at, own.dropped) == (single.looked_at, single.dropped)
        assert [(e.prompt, e.answer) for e in own.all] == [(e.prompt, e.answer) for e in single.all]
    for part in ("scored", "held_out"):
        parts = [example for own in together.sets.values() for example in getattr(own, part)]
        assert Counter(parts) == Counter(getattr(together, part))
    assert not {e.prompt for e in together.scored} & {e.prompt for e in together.held_out}


def test_a_set_that_falls_short_is_said_and_does_not_take_from_others(
    files: Path, plain: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {"prompt": "What is the colour of the sky?"}
    write(files / "few.jsonl", [*rows("few", 2), bad])
    examples = load(plain, "chat.jsonl,few.jsonl", samples=8, holdout=4)
    assert kinds(examples.scored) == ["chat", "few", "chat", "few", "chat", "chat"]
    assert kinds(examples.held_out) == ["chat", "chat"]
    chat, few = examples.sets.values()
    assert (chat.looked_at, chat.asked, chat.dropped) == (6, (4, 0, 2), {})
    dropped = {"no answer among its keys: prompt": 1}
    assert (few.looked_at, few.asked, few.dropped) == (3, (4, 0, 2), dropped)
    remedy = "give rows in a form that is read (docs/data.md)"
    say_counts(Console(json_output=False, verbosity=0), examples)
    assert capsys.readouterr().err.splitlines() == [
        "examples: 8 of 9 rows kept (6 to score layers on, 2 held out), where 8 + 4 were "
        "asked for: " + remedy,
        "  chat: 6 of 6 rows kept (4 to score layers on, 2 held out)",
        "  few: 2 of 3 rows kept (2 to score layers on, 0 held out), where 4 + 2 were asked for: "
        + remedy,
        "    dropped: no answer among its keys: prompt: 1",
    ]
    # Those of a single source are one paragraph.
    say_counts(Console(json_output=False, verbosity=0), load(plain, "few.jsonl"))
    assert capsys.readouterr().err.splitlines() == [
        "examples: 2 of 3 rows kept (2 to score layers on, 0 held out), where 8 + 4 were "
        "asked for: " + remedy,
        "  dropped: no answer among its keys: prompt: 1",
    ]


@pytest.mark.usefixtures("files")
def test_a_sample_for_each_set_is_the_least(plain: Tokenizer) -> None:
    assert kinds(load(plain, "chat.jsonl,code.jsonl", samples=2).scored) == ["chat", "code"]
    with pytest.raises(DataError, match="more data sets than examples"):
        load(plain, "chat.jsonl,code.jsonl", samples=1)


@pytest.mark.usefixtures("files")
def test_a_label_is_the_kind_of_every_example(plain: Tokenizer) -> None:
    assert set(kinds(load(plain, "talk=chat.jsonl").scored)) == {"talk"}
    assert set(kinds(load(plain, "mine=recall").scored)) == {"mine"}
    assert set(kinds(load(plain, "recall").scored)) == set(KINDS)
    assert set(kinds(load(plain, "a=b,c.jsonl").scored)) == {"data"}


# Rows: taken before there were labels. Others: since a larger draw begins with the smaller one.
BEFORE_LABELS = {
    "recall": (
        "2969cac77e91bfc755f18217f7acb12c2b4ad441f2b1b633216b306c47cea63e",
        "eccba9b274896e8e1056c69c15b7576b11effb8960146d46f7fbd25b40d96a82",
    ),
    "rows.jsonl": (
        "5f22a8e19fa8573dafb9395f7b3c418db50a8c32302adf06f85cacefc16168a6",
        "55eb5861c09d0ecef14c118c935885e139349682b0e4bc649b708fb9a10ad8f6",
    ),
    "text.txt": (
        "ec1111256947cb4c49853d32397bd8bb5af14fe6a5f8744ecfe87ad3c3935259",
        "643357f41b22d4a1f1d812ce3c88ea57a882a76748bb3b8f27fe9e1d4846ef0e",
    ),
}


@pytest.mark.parametrize("data", BEFORE_LABELS)
def test_a_single_source_has_the_fingerprint_it_always_had(
    data: str, plain: Tokenizer, files: Path
) -> None:
    write(files / "rows.jsonl", numbered(30))
    text = "The sea was calm. A boat went by. Nobody spoke for a while. " * 40
    (files / "text.txt").write_text(text)
    examples = load(plain, data, seed=3)
    found = fingerprint_of(examples.scored), fingerprint_of(examples.held_out)
    assert found == BEFORE_LABELS[data]
    # A generated prompt may leave too little room for its answer in a context as short as this.
    dropped = {"prompt and answer longer than the model's context": 1} if data == "recall" else {}
    assert (examples.looked_at, examples.dropped) == (12, dropped)
    assert examples.sets == {}


@pytest.mark.usefixtures("files")
def test_other_labels_are_another_fingerprint(plain: Tokenizer) -> None:
    """Else a run that is taken up again would mix scores under old labels with new ones."""
    names = ["chat.jsonl,code.jsonl", "a=chat.jsonl,b=code.jsonl", "b=chat.jsonl,a=code.jsonl"]
    prints = [fingerprint_of(load(plain, data).scored) for data in (*names, "x=chat.jsonl")]
    assert len({*prints, fingerprint_of(load(plain, "chat.jsonl").scored)}) == 5


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("minimum", [1, 9])
def test_moved_evidence_is_found_at_the_index_of_its_example(
    minimum: int, plain: Tokenizer
) -> None:
    """Also where another set falls short and rows of the generated set are dropped."""
    mask = Mask(200, 2)
    write(Path("few.jsonl"), [{"prompt": "p" * 300, "answer": "Blue." * 3}] * 2)
    least = {"min_answer_tokens": minimum}
    settings = asking("few.jsonl,recall,mine=sea.txt", samples=12, length_tokens=900, **least)
    loaded = load_examples(plain, settings, mask, LAYERS, 1024)
    scored, near = loaded.scored, near_examples(plain, loaded, mask)
    generated = {index for index, example in enumerate(scored) if example.kind != "few"}
    assert near
    assert near.keys() <= generated
    assert minimum > 1 or near.keys() == generated
    for index, example in near.items():
        far = scored[index]
        assert (example.kind, example.answer) == (far.kind, far.answer)
        assert sorted(example.prompt) == sorted(far.prompt)
        assert example.prompt != far.prompt
