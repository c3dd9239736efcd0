"""Reading a SentencePiece model file (tokenizer.model) and the llama form of tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.common.errors import GgufError, SourceError

# Kinds of tokens; SentencePiece and GGUF number them alike.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "▁"
_BYTES = {f"<0x{value:02X}>" for value in range(256)}


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary, by token id, whose merges llama.cpp does in the order of scores, highest first.

    Attributes:
        adds_space: whether a text gets a space in front.
    """

    texts: list[str]
    scores: list[float]
    kinds: list[int]
    adds_space: bool


def read_model_file(path: Path) -> Vocabulary:
    """Read a tokenizer.model.

    Only protobuf's parser sees the file, not sentencepiece's native code, which it might crash.

    Raises:
        SourceError: it is damaged, or not of the kind that llama.cpp computes.
        GgufError: sentencepiece or protobuf is not installed.
    """
    messages, decode_error = _messages()
    try:
        model = messages.ModelProto.FromString(path.read_bytes())
        # A text that is not UTF-8 comes as bytes.
        if not model.pieces or any(isinstance(piece.piece, bytes) for piece in model.pieces):
            raise ValueError("it has no tokens, or a text that is not UTF-8")
    except (decode_error, ValueError) as error:
        raise SourceError(
            "the SentencePiece model is damaged", where=path, got=error,
            next_step="download it again",
        ) from error  # fmt: skip
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != messages.TrainerSpec.BPE:
        raise SourceError(
            "this kind of SentencePiece model cannot be exported",
            where=path,
            expected="BPE, as Llama and Mistral have",
            got=f"model_type {trainer.model_type}",
        )
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise SourceError(
            "this SentencePiece model rewrites texts, which llama.cpp would not",
            where=path,
            expected="no normalisation and no removal of spaces",
        )
    return Vocabulary(
        [piece.piece for piece in model.pieces],
        [piece.score for piece in model.pieces],
        [piece.type for piece in model.pieces],
        normalizer.add_dummy_prefix,
    )


def _messages() -> tuple[Any, type[Exception]]:
    """Sentencepiece's protocol buffer, and the error of bytes that are none."""
    try:
        from google.protobuf.message import DecodeError
        from google.protobuf.runtime_version import VersionError

        try:
            from sentencepiece import sentencepiece_model_pb2
        except VersionError as error:
            raise ImportError(str(error)) from error
    except ImportError as error:
        raise GgufError(
            "a tokenizer.model cannot be read without sentencepiece and protobuf",
            got=error,
            next_step="install the extra: pip install --upgrade sentencepiece protobuf",
        ) from error
    return sentencepiece_model_pb2, DecodeError


def is_llama_form(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is a SentencePiece BPE vocabulary written as merges."""
    model = tokenizer["model"]
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def read_llama_form(tokenizer: Mapping[str, Any], where: Path) -> Vocabulary:
    """The vocabulary of a llama-style tokenizer.json, with scores that give the same merges.

    llama.cpp merges two neighbours whenever their text is in the vocabulary, the highest score
    first; tokenizers merges the pairs of its list, the first one first. The two agree when the list
    holds every such pair, all pairs of a text together: then a text's score is minus its rank.

    Raises:
        SourceError: they do not agree, or texts are split or normalised in another way.
    """
    model = tokenizer["model"]
    adds_space = _adds_space(tokenizer, where)
    vocabulary: dict[str, int] = model["vocab"]
    specials = {token["content"] for token in tokenizer.get("added_tokens", [])}
    if model.get("ignore_merges") or not vocabulary.keys() >= _BYTES:
        raise _unlike(where, "it has no token for each byte, or takes whole words first")
    ranks = _merge_ranks(model["merges"], vocabulary.keys() - specials - _BYTES, where)
    size = max(vocabulary.values()) + 1
    texts = [f"[PAD{index}]" for index in range(size)]
    scores, kinds = [0.0] * size, [UNUSED] * size
    for text, index in vocabulary.items():
        texts[index] = text
        scores[index] = -float(ranks.get(text, 0))
        kinds[index] = BYTE if text in _BYTES else NORMAL
    unknown = model.get("unk_token")
    if unknown in vocabulary:
        kinds[vocabulary[unknown]] = UNKNOWN
    return Vocabulary(texts, scores, kinds, adds_space)


def _merge_ranks(merges: Sequence[Any], usable: set[str], where: Path) -> dict[str, int]:
    """The rank of each merged text, after checking that scores can say what the list says."""
    ranks: dict[str, int] = {}
    pairs: dict[str, set[str]] = {}
    last = ""
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        text = left + right
        if text != last and text in ranks:
            raise _unlike(where, f"merges into {text!r} do not stand together")
        ranks.setdefault(text, len(ranks) + 1)
        pairs.setdefault(text, set()).add(left)
        last = text
    for text in usable:
        cuts = range(1, len(text))
        possible = {text[:i] for i in cuts if text[:i] in usable and text[i:] in usable}
        if possible != pairs.get(text, set()):
            raise _unlike(where, f"{text!r} could be merged in other ways than its list says")
    return ranks


def _adds_space(tokenizer: Mapping[str, Any], where: Path) -> bool:
    """Whether a text gets a space in front; refused when anything else happens to it."""
    normalizer, splitter = tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")
    if normalizer is None and splitter is not None and splitter.get("type") == "Metaspace":
        if splitter.get("split", True):
            raise _unlike(where, "it splits texts at spaces")
        return bool(splitter.get("prepend_scheme", "always") != "never")
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepends = {"type": "Prepend", "prepend": SPACE}
    if splitter is None and steps in ([prepends, replaces], [replaces]):
        return len(steps) == 2
    raise _unlike(where, "it normalises or splits texts in another way")


def _unlike(where: Path, reason: str) -> SourceError:
    return SourceError(
        "llama.cpp would not tokenize like this tokenizer",
        where=where,
        got=reason,
        next_step="put the model's own tokenizer.model in its place, if there is one",
    )
