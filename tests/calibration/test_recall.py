"""The built-in recall examples: length, distance, depth, determinism, and answers."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from converter.calibration.data.facts import (
    KEYS,
    KINDS,
    RELATIONS,
    SPAN_LENGTH,
    SPAN_WORDS,
    TAGS,
    VALUES,
)
from converter.calibration.data.haystack import text_sentences
from converter.calibration.data.recall import (
    RecallExample,
    base_prompt,
    chat_request,
    growing_depths,
    recall_examples,
    with_evidence_last,
)
from converter.common.errors import DataError
from tests.conftest import DEMO


def words(text: str) -> int:
    return len(text.split())


def words_and_a_beginning(text: str) -> int:
    """Count as a tokenizer does that puts a mark before every text."""
    return 1 + words(text)


def counters() -> list[pytest.param]:
    found = [
        pytest.param(words, id="words"),
        pytest.param(words_and_a_beginning, id="words-and-bos"),
        pytest.param(len, id="characters"),
    ]
    if DEMO.exists():
        tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
        found.append(pytest.param(lambda text: len(tokenizer.encode(text).ids), id="demo"))
    return found


@pytest.fixture(params=counters())
def counter(request: pytest.FixtureRequest) -> Callable[[str], int]:
    return request.param


def scale(count: Callable[[str], int]) -> tuple[int, int]:
    return (3000, 1000) if count is len else (300, 90)


def make(count: Callable[[str], int] = words, **changes: object) -> tuple[RecallExample, ...]:
    length, reach = scale(count)
    settings = {"samples": 32, "length_tokens": length, "reach_tokens": reach, "seed": 5}
    return recall_examples(count, **{**settings, **changes})


def of_kind(kind: str, **changes: object) -> list[RecallExample]:
    return [example for example in make(**changes) if example.kind == kind]


def chain(example: RecallExample) -> list[re.Match[str]]:
    """Find, without the generator's help, the facts that a link's answer needs, in order."""
    key, needed = example.cloze.removeprefix("Now give "), []
    while call := re.search(rf"Call {key} (\w+)\.", example.context):
        needed.append(call)
        key = call.group(1)
    give = re.search(rf"Give {key} (\w+)\.", example.context)
    assert give
    return [*needed, give]


def evidence_end(example: RecallExample) -> int:
    """Find where the nearest needed fact ends in the context."""
    if example.kind == "link":
        return max(fact.end() for fact in chain(example))
    fact = f"{example.cloze} {example.answer}."
    return example.context.index(fact) + len(fact)


def answer_from(example: RecallExample) -> str:
    """Answer by reading the context: the only fact that completes the sentence."""
    if example.kind == "link":
        return chain(example)[-1].group(1)
    (found,) = re.findall(rf"(?:^|\. ){example.cloze} ([^.]+)(?=\.)", example.context)
    return str(found)


def test_answer_length_and_distance_are_as_the_tokenizer_counts_them(
    counter: Callable[[str], int],
) -> None:
    length, reach = scale(counter)
    longest_filler = 90 if counter is len else 14
    for example in make(counter):
        assert answer_from(example) == example.answer
        prompt = counter(base_prompt(example))
        assert length - longest_filler < prompt <= length
        until = counter(example.context[: evidence_end(example)])
        assert example.distance_tokens == prompt - until > reach


def test_evidence_is_what_the_answer_is_found_in(counter: Callable[[str], int]) -> None:
    for example in make(counter):
        assert all(example.context.count(sentence) == 1 for sentence in example.evidence)
        last = max(example.context.index(s) + len(s) for s in example.evidence)
        assert last == evidence_end(example)
        # Without it, the question has no answer any more.
        rest = example.context
        for sentence in example.evidence:
            rest = rest.replace(sentence, "")
        if example.kind == "link":
            assert len(example.evidence) == len(chain(example))
        else:
            assert f"{example.cloze} {example.answer}." not in rest


def test_evidence_is_moved_to_the_end_and_nothing_else_changes(
    counter: Callable[[str], int],
) -> None:
    for example in make(counter):
        moved = with_evidence_last(example)
        assert moved.context.endswith(" ".join(moved.evidence))
        assert sorted(moved.context.split()) == sorted(example.context.split())
        assert answer_from(moved) == example.answer
        assert replace(moved, context=example.context) == example
        # What is not evidence keeps its order.
        rest, before = moved.context, example.context
        for sentence in example.evidence:
            rest, before = rest.replace(sentence, ""), before.replace(sentence, "")
        assert rest.split() == before.split()


def test_evidence_is_early_and_marked_when_reach_passes_the_length() -> None:
    for example in make(length_tokens=400, reach_tokens=5000):
        assert 400 * 0.7 < example.distance_tokens <= 5000


@pytest.mark.parametrize("kind", KINDS)
def test_depths_cover_the_range_evenly(kind: str) -> None:
    examples = of_kind(kind, samples=160, length_tokens=2000, reach_tokens=1000)
    distances = sorted(example.distance_tokens for example in examples)
    # One per fortieth of 1000..2000, each off by at most a few sentences.
    for i, distance in enumerate(distances):
        assert abs(distance - (1000 + (i + 0.5) * 1000 / 40)) < 45


@pytest.mark.parametrize(
    "pattern", [r"Give (\w+) \w+\.", r"Call (\w+) \w+\.", r"They (\w+ [A-Z]\w+) ", r"Say (\w+) "]
)
def test_facts_never_contradict_each_other(pattern: str) -> None:
    for example in make():
        found = re.findall(pattern, example.context)
        assert all(key.split()[-1] in (*KEYS, *TAGS) for key in found)
        assert len(found) == len(set(found)) > 1


def test_links_need_two_facts_and_some_three() -> None:
    lengths = {len(chain(example)) for example in of_kind("link", samples=128)}
    assert lengths == {2, 3}


def test_relation_and_key_are_both_needed() -> None:
    for example in of_kind("relation", samples=128):
        _, relation, key = example.cloze.split()
        assert len(re.findall(rf"They {relation} [A-Z]", example.context)) > 1
        assert len(re.findall(rf"They \w+ {key} ", example.context)) > 1


def test_answers_are_words_of_lexicons_that_do_not_overlap() -> None:
    for example in make():
        answer, span = example.answer.split(), example.kind == "span"
        assert len(answer) == (SPAN_LENGTH if span else 1)
        assert set(answer) <= set(SPAN_WORDS if span else VALUES)
    together = [word.lower() for word in (*KEYS, *VALUES, *RELATIONS, *TAGS, *SPAN_WORDS)]
    assert len(together) == len(set(together))


def test_same_seed_same_examples_in_another_process_without_torch() -> None:
    program = (
        "import sys\n"
        "from converter.calibration.data.recall import recall_examples\n"
        "print(recall_examples(lambda t: len(t.split()), samples=8, length_tokens=300,"
        " reach_tokens=90, seed=5))\n"
        "assert 'torch' not in sys.modules"
    )
    root = Path(__file__).parent.parent.parent
    printed = subprocess.check_output([sys.executable, "-c", program], text=True, cwd=root)
    assert printed.strip() == repr(make(samples=8))
    assert make(seed=1) != make(seed=2)


def test_user_text_is_the_filler() -> None:
    text = " ".join(f"Line {i} of the story ends here." for i in range(500))
    for example in make(text=text):
        kept = re.findall(r"Line (\d+) of the story ends here\.", example.context)
        assert len(kept) > 10
        assert [(int(n) + 1) % 500 for n in kept[:-1]] == [int(n) for n in kept[1:]]
        assert answer_from(example) == example.answer
    # A short one is read again.
    assert all(e.context.count("Only this.") > 10 for e in make(text="Only this."))


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_any_text_is_split_without_loss(text: str) -> None:
    assert "".join("".join(text_sentences(text)).split()) == "".join(text.split())


def test_a_text_without_stops_is_cut() -> None:
    assert max(map(len, text_sentences("word " * 1000))) <= 300


@pytest.mark.parametrize("text", ["", " \n\t "])
def test_a_text_without_words_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="no sentences"):
        make(text=text)


def test_too_short_is_refused_with_the_least_length() -> None:
    with pytest.raises(DataError, match="cannot hold") as caught:
        make(length_tokens=40)
    least = int(re.findall(r"at least (\d+) tokens", str(caught.value))[0])
    assert 40 < least < 120
    assert make(length_tokens=least + 20, reach_tokens=10)


def test_kinds_take_turns_and_prompts_end_in_the_cloze() -> None:
    assert [example.kind for example in make(samples=8)] == [*KINDS, *KINDS]
    example = make()[0]
    assert base_prompt(example) == f"{example.context} {example.cloze}"
    assert example.context in chat_request(example)
    assert chat_request(example).endswith(f"{example.cloze} ...")
    assert example.answer == example.answer.strip(" .")


def test_the_text_is_counted_only_a_few_times() -> None:
    seen = 0

    def count(text: str) -> int:
        nonlocal seen
        seen += len(text)
        return words(text)

    examples = make(count, samples=4, length_tokens=16_000, reach_tokens=4_000)
    assert seen < 5 * sum(len(example.context) for example in examples)


@pytest.mark.parametrize("samples", [16, 40, 64, 200])
def test_growing_depths_are_spread_evenly_at_any_number(samples: int) -> None:
    """The largest gap of a golden-section sequence is below 2.62 even ones (Sós, 1958)."""
    depths = growing_depths(samples, seed=3)
    assert growing_depths(500, seed=3)[:samples] == depths
    for kind in range(len(KINDS)):
        mine = sorted(depths[kind :: len(KINDS)])
        assert 0 <= mine[0] < mine[-1] < 1
        gaps = [b - a for a, b in zip(mine, [*mine[1:], mine[0] + 1], strict=True)]
        assert max(gaps) * len(mine) < 2.62
