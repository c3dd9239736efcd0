"""Tasks: RULER's definitions, parameters and scoring, exact lengths, one right answer."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import astuple, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy
import pytest
from hypothesis import given as any_of
from hypothesis import strategies as st

from converter.calibration.data.haystack import text_sentences
from converter.calibration.data.recall import KINDS
from converter.common.errors import DataError, SourceError
from converter.evaluation.tasks.aggregation import (
    common_words_draft,
    frequent_words_draft,
    tracking_draft,
)
from converter.evaluation.tasks.item import Item, ItemSpec, Prompter, cleaned, largest, score
from converter.evaluation.tasks.lookup import copying_draft, pairs_draft
from converter.evaluation.tasks.needles import DEPTHS, NEEDLE, RULER_NEEDLES, needle_draft
from converter.evaluation.tasks.table import GROUPS, RULER, TASKS, TaskSettings, make_items
from converter.inference.tokenizer import load_tokenizer
from tests.conftest import DEMO, shared

# scripts/synthetic.yaml of NVIDIA/RULER, as published: haystack, keys, values, and how many keys,
# values and queries; tokens_to_generate of scripts/data/synthetic/constants.py.
PUBLISHED = {
    "niah_single_1": ("noise", "words", "numbers", 1, 1, 1),
    "niah_single_2": ("essay", "words", "numbers", 1, 1, 1),
    "niah_single_3": ("essay", "words", "uuids", 1, 1, 1),
    "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1),
    "niah_multikey_2": ("needles", "words", "numbers", 1, 1, 1),
    "niah_multikey_3": ("needles", "uuids", "uuids", 1, 1, 1),
    "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1),
    "niah_multiquery": ("essay", "words", "numbers", 1, 1, 4),
}
NEW_TOKENS = dict.fromkeys(PUBLISHED, 128) | {"vt": 30, "cwe": 120, "fwe": 50}
UUID4 = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
VALUES = {"numbers": r"[1-9]\d{6}", "uuids": UUID4}
KEYS = {"words": r"[a-z]+-[a-z]+", "uuids": UUID4}
ESSAY = text_sentences(" ".join(f"The river ran past mill number {i}." for i in range(500)))


def given(
    seed: int = 0, units: int = 40, depth: float = 0.5, length: int = 4096
) -> tuple[ItemSpec, int, tuple[str, ...]]:
    return ItemSpec(length, depth, seed), units, ESSAY


@cache
def prompter(name: str) -> Prompter:
    return Prompter(load_tokenizer(shared(f"tokenizers/{name}")))


def asked(
    made: Prompter, context_tokens: int = 2048, vocabulary: int = 10**6, **changes: Any
) -> tuple[Item, ...]:
    settings = replace(TaskSettings((), (), (2048,), 5, 10, None, 0), **changes)
    return make_items(made, settings, context_tokens, vocabulary).items


def test_parameters_are_the_published_ones() -> None:
    assert (*PUBLISHED, "vt", "cwe", "fwe") == RULER
    assert {name: TASKS[name].new_tokens for name in RULER} == NEW_TOKENS
    assert {name: astuple(needles) for name, needles in RULER_NEEDLES.items()} == PUBLISHED
    # Where RULER puts needles, in percent, in its own words.
    assert list(DEPTHS) == numpy.round(numpy.linspace(0, 100, num=40)).tolist()


@pytest.mark.parametrize("name", PUBLISHED)
def test_needles_are_as_published(name: str) -> None:
    spec = RULER_NEEDLES[name]
    for seed in range(20):
        made = needle_draft(spec, *given(seed))
        pattern = re.escape(NEEDLE).replace(r"\{kind\}", spec.value)
        pattern = pattern.replace(r"\{key\}", f"({KEYS[spec.key]})")
        pattern = pattern.replace(r"\{value\}", f"({VALUES[spec.value]})")
        hidden = re.findall(pattern, made.request)
        others = 40 if spec.haystack == "needles" else 0
        assert len(hidden) == spec.needles + others
        # Every value of the keys asked for is a reference, and no other is.
        question = made.request.rsplit("\n", 1)[-1]
        keys = [key for key in {key for key, _ in hidden} if key in question]
        assert len(keys) == spec.queries
        assert Counter(v for k, v in hidden if k in keys) == Counter(made.references)
        assert len(made.references) == spec.queries * spec.values
        assert all(sentence in made.request for sentence in made.evidence)
        assert not any(reference in made.prefix + question for reference in made.references)


@pytest.mark.parametrize("name", [n for n, t in TASKS.items() if t.has_depth])
def test_evidence_lies_at_the_depth_asked_for(name: str) -> None:
    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
        made = TASKS[name].draft(*given(3, units=400, depth=depth))
        text = made.request
        first = text.index("\n") if name.startswith("niah") else 0
        last = text.rindex("\n", 0, len(text) - len(text.rsplit("\n", 1)[-1]))
        at = text.index(made.evidence[0])
        assert (at - first) / (last - first) == pytest.approx(depth, abs=0.06), depth


def test_variable_tracking_is_one_chain_of_four_hops() -> None:
    made = tracking_draft(*given(1, units=60))
    assert len(made.references) == 5
    assert all(re.fullmatch("[A-Z]{5}", name) for name in made.references)
    # Followed through the text after the solved example, the chain gives the references.
    _, _, text = made.request.partition("\n\nFollow")
    holding = re.findall(r"have the value (\d{5})", made.prefix)
    for name, source in re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", text):
        if source in holding:
            holding.append(name)
    assert tuple(holding[1:]) == made.references


@pytest.mark.parametrize(("length", "common", "uncommon"), [(2048, 6, 1), (4096, 30, 3)])
def test_common_words_are_the_most_common(length: int, common: int, uncommon: int) -> None:
    made = common_words_draft(*given(2, units=120, length=length))
    # The question's own list comes after the solved example's.
    entries = made.request.rsplit("ones in mind.\n", 1)[1].split("\nQuestion")[0]
    counts = Counter(re.findall(r"\d+\. (\S+)", entries))
    assert len(made.references) == 10
    assert {counts.pop(word) for word in made.references} == {common}
    assert set(counts.values()) == {uncommon}
    assert len(counts) == 110


def test_frequent_words_follow_zipf() -> None:
    made = frequent_words_draft(*given(4, units=2000, length=4096))
    counts = Counter(made.request.split("frequent ones. ")[1].split("\nQuestion")[0].split())
    ranked = [word for word, _ in counts.most_common(5)]
    assert ranked[0] == "..."
    assert tuple(ranked[1:4]) == made.references
    assert all(re.fullmatch("[a-z]{6}", word) for word in made.references)
    zeta = sum(1 / k**2 for k in range(1, 200_000))
    for rank, word in enumerate(ranked, start=1):
        assert abs(counts[word] - 2000 / rank**2 / zeta) <= 1


def test_pairs_are_json_with_one_answer() -> None:
    made = pairs_draft(*given(5, units=30))
    pairs = json.loads(made.request.split("\n\n")[1])
    assert len(pairs) == 31
    assert (pairs[json.loads(made.request.rsplit("Key: ", 1)[1])],) == made.references
    assert all(re.fullmatch(UUID4, text) for pair in pairs.items() for text in pair)


def test_copying_has_one_answer() -> None:
    text = [f"Sentence number {i} is here." for i in range(60)]
    made = copying_draft(ItemSpec(512, 0.5, 1), 40, text * 3)
    body, question = made.request.rsplit("\n\n", 1)
    (before,) = re.findall('"(.*)"', question)
    sentences = re.findall(r"Sentence number \d+ is here\.", body)
    assert len(sentences) == len(set(sentences)) == 40
    assert (dict(pairwise(sentences))[before],) == made.references


def slack(item: Item) -> int:
    return item.length_tokens - len(item.prompt) - item.new_tokens


def longest_unit(made: Prompter, task: str) -> int:
    """Tokens of one needle; what a task's haystack grows by is never more."""
    value = "8a4df8f8-0e3c-4b27-a41b-6c3f9f0ce5f7" if "3" in task or task == "kv" else "1234567"
    key = value if task in ("niah_multikey_3", "kv") else "wandering-waterfall"
    return made.count("\n" + NEEDLE.format(kind="numbers", key=key, value=value)) + 4


@pytest.mark.shared
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "mistral"])
def test_lengths_are_exact_within_one_needle(name: str) -> None:
    made = prompter(name)
    items = asked(made, 9999, tasks=("all",), lengths_tokens=(1024, 4096), samples=2)
    assert {item.task for item in items} == set(GROUPS["all"])
    for item in items:
        assert 0 <= slack(item) <= longest_unit(made, item.task), item.task


def test_lengths_are_exact_without_a_chat_too(bytes_prompter: Prompter) -> None:
    chosen = ("niah_single_1", "niah_single_2", "niah_multikey_2", "kv", "vt")
    for item in asked(bytes_prompter, tasks=chosen, samples=3):
        assert 0 <= slack(item) <= longest_unit(bytes_prompter, item.task), item.task


@pytest.mark.shared
def test_a_chat_ends_with_the_assistants_prefix() -> None:
    made = prompter("qwen3")
    assert made.is_chat
    (item,) = asked(made, 4096, tasks=("niah_single_1",), samples=1)
    text = made.tokenizer.decode(item.prompt)  # type: ignore[attr-defined]
    assert text.startswith("<|im_start|>user\nA special magic number is hidden")
    assert re.search(r"<\|im_start\|>assistant\n.*The special magic number for [a-z-]+ that", text)
    assert text.endswith(" is")
    answer = made.tokenizer.decode(item.forced[item.forced_from :])  # type: ignore[attr-defined]
    assert answer == f" {item.references[0]}"


def test_the_same_seed_gives_the_same_items(bytes_prompter: Prompter) -> None:
    tasks = ("niah_multikey_1", "recall")
    first, again, other = (asked(bytes_prompter, tasks=tasks, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first[0].references != other[0].references
    assert len({item.references for item in first if item.task != "recall"}) == 10


def test_every_kind_of_recall_at_every_depth() -> None:
    """The demonstration model's own words, each one token; evidence where the cell says."""
    made = Prompter(load_tokenizer(DEMO))
    items = asked(made, 288, tasks=("recall",), lengths_tokens=(160, 288), samples=20)
    assert Counter((i.length_tokens, i.depth) for i in items) == {
        (length, depth): len(KINDS) for length in (160, 288) for depth in (0, 0.25, 0.5, 0.75, 1)
    }
    for length in (160, 288):
        mine = [item for item in items if item.length_tokens == length]
        start, middle, end = (
            [i.distance_tokens or 0 for i in mine if i.depth == depth] for depth in (0, 0.5, 1)
        )
        assert min(start) > max(middle) > max(end)
        # A filler sentence has up to a dozen words, and the room is that of the longest answer.
        assert all(0 <= slack(item) <= 20 for item in mine)


def test_a_users_text_is_the_haystack(bytes_prompter: Prompter, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(" ".join(f"Chapter {i} tells of storms at sea." for i in range(200)))
    items = asked(bytes_prompter, tasks=("niah_single_2", "copy"), haystack=path, samples=2)
    decode = bytes_prompter.tokenizer.decode  # type: ignore[attr-defined]
    assert all("tells of storms at sea" in decode(item.prompt) for item in items)
    copied = [item for item in items if item.task == "copy"]
    assert all(re.fullmatch(r"Chapter \d+ tells of .*", i.references[0]) for i in copied)
    path.write_text("One storm came. Then another one came.")
    with pytest.raises(DataError, match="too short for an item of copy"):
        asked(bytes_prompter, tasks=("copy",), haystack=path)


def test_a_vocabulary_without_a_token_is_told(bytes_prompter: Prompter) -> None:
    with pytest.raises(SourceError, match="does not know"):
        asked(bytes_prompter, vocabulary=50, tasks=("vt",))


@pytest.mark.parametrize("guess", [1, 5, 17, 40, 1000])
@pytest.mark.parametrize("limit", [1, 2, 17, 99, 100])
def test_the_largest_that_fits(guess: int, limit: int) -> None:
    fits = Mock(side_effect=limit.__ge__)
    assert largest(fits, 1, guess, most=100) == limit
    assert fits.call_count < 40
    assert largest(lambda _: False, 3, guess, most=100) is None


# Prediction, references, share of all, best of any: worked out by hand from the definition.
BY_HAND = [
    ("The numbers are 12 and 34.", ("12", "34"), 1.0, 1.0),
    ("The number is 12.", ("12", "34"), 0.5, 1.0),
    ("", ("12",), 0.0, 0.0),
    ("BRAVE-LANTERN", ("brave-lantern",), 1.0, 1.0),
    ("1234567", ("123",), 1.0, 1.0),
    ("none of them", ("12", "34", "56", "78"), 0.0, 0.0),
    ("34", ("12", "34", "34"), 2 / 3, 1.0),
]


def test_scores_by_hand() -> None:
    for prediction, references, every, best in BY_HAND:
        assert score(prediction, references, "all") == pytest.approx(every), prediction
        assert score(prediction, references, "part") == best, prediction


@any_of(st.text(), st.lists(st.text(min_size=1), min_size=1, max_size=4))
def test_scores_are_rulers_formula(prediction: str, references: list[str]) -> None:
    """The published formulas, over a hundredth: `sum(found) / len(ref)` and `max(found)`."""
    found = [1.0 if r.lower() in prediction.lower() else 0.0 for r in references]
    assert score(prediction, references, "all") == sum(found) / len(references)
    assert score(prediction, references, "part") == max(found)


def test_scores_are_those_of_the_harness() -> None:
    """lm-eval carries RULER's own scoring and clean-up."""
    pytest.importorskip("lm_eval")
    from lm_eval.tasks.ruler.common_utils import postprocess_pred, string_match_all

    for prediction, references, _, _ in BY_HAND:
        for text in (prediction, f" \x07{prediction}\n\t", f"{prediction}\x1b[0m"):
            (expected,) = postprocess_pred([text])
            assert cleaned(text) == expected
            every = string_match_all([expected], [list(references)])
            assert score(cleaned(text), references, "all") == every
