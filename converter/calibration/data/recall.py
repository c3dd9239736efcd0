"""Recall examples made here: facts hidden in filler text, one of them asked for at the end.

Which layers need full attention shows only on answers that depend on something far away, and here
that distance is known. Four kinds of question need different work, so that no single layer can
answer them all:

- pair: one lookup by key;
- link: two or three lookups, each by the result of the one before;
- relation: a lookup by two words together;
- span: six words copied back in order.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

from converter.calibration.data.facts import (
    DEFAULT_COUNTS,
    KINDS,
    Counts,
    Fact,
    draw_facts,
    questions,
)
from converter.calibration.data.haystack import filler_pool, filler_stream
from converter.common.errors import DataError

_POOL_SENTENCES = 2048
# With fewer other facts than this, an answer could be guessed.
_FEWEST_OTHERS = 8
_GOLDEN = (5**0.5 - 1) / 2
# Tokenizers are nearly additive over sentences; a few corrections settle what they are not.
_ATTEMPTS = 5


@dataclass(frozen=True)
class RecallExample:
    """One question about one fact inside a text.

    Attributes:
        cloze: an unfinished sentence about one fact, such as "Give Amber".
        answer: the missing words, without a leading space or a final period.
        distance_tokens: tokens between the end of the nearest evidence and the answer.
        evidence: the sentences of the context that the answer depends on.
    """

    context: str
    cloze: str
    answer: str
    kind: str
    distance_tokens: int
    evidence: tuple[str, ...] = ()


def with_evidence_last(example: RecallExample) -> RecallExample:
    """The same text with its evidence moved to the end, right before the question."""
    context = example.context
    for sentence in example.evidence:
        context = context.replace(f"{sentence} ", "", 1)
    return replace(example, context=" ".join([context, *example.evidence]))


def base_prompt(example: RecallExample) -> str:
    """The text for a base model: the prompt, a space and the answer are the full text."""
    return f"{example.context} {example.cloze}"


def chat_request(example: RecallExample) -> str:
    """The user message for a chat model."""
    return (
        f"{example.context}\n\nComplete this sentence from the text above. "
        f"Reply with the missing words only.\n{example.cloze} ..."
    )


def recall_examples(
    count_tokens: Callable[[str], int],
    *,
    samples: int,
    length_tokens: int,
    reach_tokens: int,
    seed: int,
    text: str | None = None,
    depths: Sequence[float] | None = None,
    counts: Counts = DEFAULT_COUNTS,
) -> tuple[RecallExample, ...]:
    """Make recall examples of one length, the kinds in turn.

    Evidence is farther from the answer than `reach_tokens` where the length allows it, spread
    evenly, kind by kind, over what remains. Otherwise it lies in the first quarter.

    Args:
        count_tokens: tokens of a text under the tokenizer in use; may add a fixed number.
        length_tokens: tokens of each `base_prompt`: never more, less by at most a filler sentence.
        reach_tokens: how far stacked sliding layers can relay, layers x window (+ sinks).
        text: filler to use in place of the built-in sentences.
        depths: of each sample from 0 to 1, over what lies beyond the reach; None: evenly spread.

    Raises:
        DataError: the text has no words, or the length cannot hold the facts and the question.
    """
    rng = random.Random(seed)  # noqa: S311 (reproducible on purpose)
    # Counted after another sentence, so that what a tokenizer adds at the start of a text (a
    # beginning mark, a space) does not count for every sentence.
    before = "It was so."
    tokens_before = count_tokens(before)
    cost = cache(lambda sentence: count_tokens(f"{before} {sentence}") - tokens_before)
    pool = filler_pool(rng, text, _POOL_SENTENCES)
    if not pool:
        raise DataError(
            "the calibration text has no sentences", next_step="give a text with words in it"
        )
    examples = []
    for i, depth in enumerate(_spread_depths(rng, samples) if depths is None else depths):
        facts, kind = draw_facts(rng, counts), KINDS[i % len(KINDS)]
        filler = filler_stream(rng, pool, in_order=text is not None)
        composer = _Composer(facts, kind, depth, filler, rng, cost)
        examples.append(composer.example(count_tokens, length_tokens, reach_tokens))
    return tuple(examples)


def _spread_depths(rng: random.Random, samples: int) -> list[float]:
    """Depths in [0, 1): each kind's n samples fall one into each n-th of the range."""
    depths = [0.0] * samples
    for kind in range(len(KINDS)):
        mine = range(kind, samples, len(KINDS))
        strata = rng.sample(range(len(mine)), len(mine))
        for i, stratum in zip(mine, strata, strict=True):
            depths[i] = (stratum + rng.random()) / len(mine)
    return depths


def growing_depths(samples: int, seed: int) -> list[float]:
    """Depths in [0, 1), spread evenly for each kind; those of fewer samples are their beginning.

    Each kind goes round the range in steps of the golden section, which leaves no large gap at any
    number of them (Weyl's sequence).
    """
    rng = random.Random(seed)  # noqa: S311 (reproducible on purpose)
    starts = [rng.random() for _ in KINDS]
    return [(starts[i % len(KINDS)] + i // len(KINDS) * _GOLDEN) % 1 for i in range(samples)]


class _Composer:
    """One example; all its randomness but the filler's is spent at the start."""

    def __init__(
        self,
        facts: Sequence[Fact],
        kind: str,
        depth: float,
        filler: Iterator[str],
        rng: random.Random,
        cost: Callable[[str], int],
    ) -> None:
        self.depth, self.cost = depth, cost
        self.question = rng.choice(questions(facts, kind))
        self.evidence = rng.sample(self.question.evidence, len(self.question.evidence))
        sentences = (fact.sentence for fact in facts)
        others = [sentence for sentence in sentences if sentence not in self.evidence]
        self.others = sorted((rng.random(), sentence) for sentence in others)
        self.partner_depths = [rng.random() for _ in self.evidence[:-1]]
        self._stream, self._filler = filler, [next(filler)]

    def example(
        self, count_tokens: Callable[[str], int], length_tokens: int, reach_tokens: int
    ) -> RecallExample:
        """Lay out and count until length and distance hold as tokenized; DataError where not."""
        length, reach, question = length_tokens, reach_tokens, self.question
        for _ in range(_ATTEMPTS):
            sentences, planned_far = self._compose(length, reach)
            context = " ".join(sentences)
            last_evidence = max(map(sentences.index, self.evidence))
            total = count_tokens(f"{context} {question.cloze}")
            distance = total - count_tokens(" ".join(sentences[: last_evidence + 1]))
            if total > length_tokens:
                length -= total - length_tokens
            elif planned_far and distance <= reach_tokens:
                reach += reach_tokens - distance + 1
            else:
                said = question.cloze, question.answer, question.kind
                return RecallExample(context, *said, distance, tuple(self.evidence))
        raise DataError(
            "this tokenizer's counts do not settle on an example of the length asked for",
            expected=f"{length_tokens} tokens",
            next_step="ask for another length",
        )

    def _compose(self, length_tokens: int, reach_tokens: int) -> tuple[list[str], bool]:
        """Sentences in order, and whether the evidence was to be farther than the reach."""
        cost = self.cost
        others, needed = self._others_within(length_tokens - cost(self._filler[0]))
        filler = self._filler_within(length_tokens - needed)
        if not filler:
            least = needed + cost(self._filler[0])
            raise DataError(
                "the example length cannot hold the facts and the question",
                expected=f"at least {least} tokens",
                got=f"{length_tokens} tokens",
                next_step=f"ask for longer examples, by {least - length_tokens} tokens or more",
            )
        first = cost(filler[0])
        total = needed + sum(map(cost, filler))
        body = total - cost(self.question.cloze)
        earliest_end = first + sum(map(cost, self.evidence))
        latest_end = total - reach_tokens - 1
        far = latest_end >= earliest_end
        if not far:
            latest_end = max(earliest_end, total // 4)
        # The last evidence by the depth, the rest of it anywhere before.
        *earlier, last = self.evidence
        start = earliest_end + self.depth * (latest_end - earliest_end) - cost(last)
        wanted = [(start, last), *((first + u * (body - first), s) for u, s in others)]
        for sentence, depth in zip(earlier, self.partner_depths, strict=True):
            room = max(0.0, start - cost(sentence) - first)
            wanted.append((first + depth * room, sentence))
        return self._merge(filler, sorted(wanted), latest_end), far

    def _filler_within(self, tokens: int) -> list[str]:
        """Filler in the order drawn, ending before the sentence that would pass `tokens`."""
        used, count = 0, 0
        while True:
            if count == len(self._filler):
                self._filler.append(next(self._stream))
            used += self.cost(self._filler[count])
            if used > tokens:
                return self._filler[:count]
            count += 1

    def _others_within(self, tokens: int) -> tuple[list[tuple[float, str]], int]:
        """The facts not asked for, fewer where all would not fit, and what all facts cost."""
        cost, others = self.cost, list(self.others)
        needed = sum(map(cost, (*self.evidence, *(s for _, s in others), self.question.cloze)))
        while needed > tokens and len(others) > _FEWEST_OTHERS:
            # From the middle of their order in the text, so that they stay spread over it.
            needed -= cost(others.pop(len(others) // 2)[1])
        return others, needed

    def _merge(
        self, filler: list[str], wanted: list[tuple[float, str]], latest_end: int
    ) -> list[str]:
        """Put facts between filler sentences near their wanted starts, evidence never too late."""
        cost, waiting = self.cost, [sentence for _, sentence in wanted]
        starts = {sentence: start for start, sentence in wanted}
        placed, rest = [filler[0]], filler[1:][::-1]
        position = cost(filler[0])
        while waiting or rest:
            fact_is_due = waiting and (
                not rest or starts[waiting[0]] <= position + cost(rest[-1]) / 2
            )
            chosen = waiting[0] if fact_is_due else rest[-1]
            pending = [sentence for sentence in waiting if sentence in self.evidence]
            still = sum(map(cost, pending))
            if pending and chosen not in pending and position + cost(chosen) + still > latest_end:
                chosen = pending[0]
            if chosen in starts:
                waiting.remove(chosen)
            else:
                rest.pop()
            placed.append(chosen)
            position += cost(chosen)
        return placed
