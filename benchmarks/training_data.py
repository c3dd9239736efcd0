"""Token sequences that train the demonstration model, and its tokenizer.

The sequences are what `converter.calibration.data.recall` writes as text, drawn directly as
tokens: in the recall forms and in the filler grammar every word is one token, so a sentence's
tokens are looked up word by word. `prove` checks that against the real tokenizer.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from converter.calibration.data import facts as recall
from converter.calibration.data import haystack as filler

# "hop" is the first half of a link; it is trained but never an example's question.
ANSWER_KINDS = (*recall.KINDS, "hop")
_OPENINGS = ("Give", "Call", "Say", *(f"They {relation}" for relation in recall.RELATIONS))
END_OF_TEXT = "<|endoftext|>"
_PIECE = re.compile(r" ?\w+|[^\w\s]")
# Qwen2's published split, so that engines which know that tokenizer's rules treat ours alike.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def words() -> list[str]:
    """Every word that must be one token, with its leading space where it has one."""
    lexicon = (*recall.KEYS, *recall.VALUES, *recall.RELATIONS, *recall.TAGS, *recall.SPAN_WORDS)
    rng = random.Random(0)  # noqa: S311
    sentences = [filler.filler_sentence(rng) for _ in range(20_000)]
    facts = "Give Amber. Call Amber. Now give Amber. They lent Amber. Say Alpha."
    found = {f" {word}" for word in lexicon} | set(_PIECE.findall(" " + facts))
    for sentence in sentences:
        found.update(_PIECE.findall(" " + sentence))
        found.add(
            sentence.split(" ", 1)[0].rstrip(",")
        )  # as the text's first word: no space before
    return sorted(found)


def build_tokenizer() -> Tokenizer:
    """Train the byte-level BPE tokenizer: bytes, then merges until each of `words` is whole."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words(), trainer)
    return tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """Token ids of whole words, and how many ids the tokenizer has in all."""

    ids: dict[str, int]
    size: int

    def tokens(self, text: str) -> list[int]:
        """Token ids of text made of known words."""
        return _lookup(self, text)

    def __hash__(self) -> int:
        return id(self)


@lru_cache(maxsize=200_000)
def _lookup(vocabulary: Vocabulary, text: str) -> list[int]:
    return [vocabulary.ids[piece] for piece in _PIECE.findall(text)]


@dataclass
class Draft:
    """A sequence under construction.

    Attributes:
        tokens: token ids so far.
        answers: for each token 0, or 1 + the index in `ANSWER_KINDS` of the answer it belongs to.

    """

    vocabulary: Vocabulary
    tokens: list[int]
    answers: list[int]

    def open(self, sentence: str) -> None:
        """Begin the text: the first word has no space before it."""
        self.tokens += self.vocabulary.tokens(sentence)
        self.answers += [0] * len(self.tokens)

    def text(self, sentence: str) -> None:
        """Go on with a sentence."""
        found = self.vocabulary.tokens(" " + sentence)
        self.tokens += found
        self.answers += [0] * len(found)

    def ask(self, kind: str, cloze: str, answer: str) -> None:
        """Go on with a question and its answer, which counts as determined."""
        self.text(cloze)
        found = self.vocabulary.tokens(" " + answer)
        self.tokens += found
        self.answers += [1 + ANSWER_KINDS.index(kind)] * len(found)
        self.tokens += self.vocabulary.tokens(".")
        self.answers.append(0)


def chain_stream(draft: Draft, rng: random.Random, length: int, chains: int) -> None:
    """Say a few chains of two to six random words again and again.

    Every repeated word but a chain's first is an answer.

    Long chains teach the copying of what followed a word earlier, and with words from all lexicons
    short ones then teach looking up. Started with pairs alone, that takes many times longer.
    """
    every = (*recall.KEYS, *recall.VALUES, *recall.TAGS, *recall.SPAN_WORDS)
    words_left = rng.sample(every, chains * 6)
    said = []
    for _ in range(chains):
        count = rng.randint(2, 6)
        said.append((rng.choice(_OPENINGS), words_left[:count]))
        words_left = words_left[count:]
    seen: set[str] = set()
    while len(draft.tokens) < length:
        opening, (first, *rest) = rng.choice(said)
        if first in seen:
            draft.ask("span" if len(rest) > 1 else "pair", f"{opening} {first}", " ".join(rest))
        else:
            draft.text(f"{opening} {first} {' '.join(rest)}.")
        seen.add(first)


def _all_questions(facts: Sequence[recall.Fact]) -> list[recall.Question]:
    found = [question for kind in recall.KINDS for question in recall.questions(facts, kind)]
    hops = recall.questions(facts, recall.CALL)
    return found + [replace(question, kind="hop") for question in hops]


def mixed_stream(draft: Draft, rng: random.Random, stage: Stage) -> None:
    """All kinds, each fact asked again and again as soon as it has been stated."""
    facts = recall.draw_facts(rng, stage.counts)
    unseen = [fact.sentence for fact in facts]
    rng.shuffle(unseen)
    seen: set[str] = set()
    asked = _all_questions(facts)
    draft.open(filler.filler_sentence(rng))
    while len(draft.tokens) < stage.length_tokens:
        if rng.random() < stage.filler_share:
            draft.text(filler.filler_sentence(rng))
        ready = [question for question in asked if seen.issuperset(question.evidence)]
        if unseen and (not ready or rng.random() < 0.5):
            sentence = unseen.pop()
            draft.text(sentence)
            seen.add(sentence)
        else:
            question = rng.choice(ready)
            draft.ask(question.kind, question.cloze, question.answer)


def far_questions(draft: Draft, rng: random.Random, stage: Stage) -> None:
    """Write the examples' own layout: facts early inside filler, more filler, then questions."""
    length, facts = stage.length_tokens, recall.draw_facts(rng, stage.counts)
    sentences = [fact.sentence for fact in facts]
    rng.shuffle(sentences)
    asked = _all_questions(facts)
    rng.shuffle(asked)
    draft.open(filler.filler_sentence(rng))
    spread = rng.random() * 0.6
    for sentence in sentences:
        if rng.random() < spread:
            draft.text(filler.filler_sentence(rng))
        draft.text(sentence)
    start = rng.randint(length // 3, length - 30)
    while len(draft.tokens) < start:
        draft.text(filler.filler_sentence(rng))
    between = rng.random() * 0.4
    for question in asked:
        draft.ask(question.kind, question.cloze, question.answer)
        if rng.random() < between:
            draft.text(filler.filler_sentence(rng))
    while len(draft.tokens) < length:
        draft.text(filler.filler_sentence(rng))


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum.

    Attributes:
        name: for the log.
        length_tokens: sequence length.
        chains: for the first stages, how many chains of words; 0 for all kinds.
        far_share: of the mixed stages, the share of sequences in the examples' own layout.
        filler_share: chance of a filler sentence before each statement of a mixed stream.
        counts: how many facts of each kind.
        until_loss: go on when the running answer loss is below this.
        most_steps: go on after this many steps anyway.

    """

    name: str
    length_tokens: int
    chains: int
    far_share: float
    filler_share: float
    counts: recall.Counts
    until_loss: float
    most_steps: int


def batch(
    stage: Stage, vocabulary: Vocabulary, rng: random.Random, batch_tokens: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Draw tokens and answer marks, both (sequences, length_tokens)."""
    count = max(1, batch_tokens // stage.length_tokens)
    tokens = np.zeros((count, stage.length_tokens), dtype=np.int64)
    answers = np.zeros((count, stage.length_tokens), dtype=np.int64)
    for row in range(count):
        draft = Draft(vocabulary, [], [])
        if stage.chains:
            chain_stream(draft, rng, stage.length_tokens, stage.chains)
        elif rng.random() < stage.far_share:
            far_questions(draft, rng, stage)
        else:
            mixed_stream(draft, rng, stage)
        tokens[row] = draft.tokens[: stage.length_tokens]
        answers[row] = draft.answers[: stage.length_tokens]
    return tokens, answers


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Look up every word; raise ValueError for one that is not a single token."""
    ids = {}
    for word in (*words(), ".", ","):
        found = tokenizer.encode(word).ids
        if len(found) != 1:
            raise ValueError(f"{word!r} is {len(found)} tokens; the sampler needs one")
        ids[word] = found[0]
    return Vocabulary(ids, tokenizer.get_vocab_size())


def prove(tokenizer: Tokenizer, known: Vocabulary, stages: tuple[Stage, ...]) -> None:
    """Raise ValueError unless drawn tokens are what the tokenizer makes of the same text."""
    for stage in stages:
        drawn = batch(stage, known, random.Random(0), 20_000)[0].tolist()  # noqa: S311
        for tokens in drawn:
            if tokenizer.encode(tokenizer.decode(tokens)).ids != tokens:
                raise ValueError(f"stage {stage.name!r}: text and tokens differ")
