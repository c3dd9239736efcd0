"""Reading a SentencePiece model file (tokenizer.model) and the llama form of tokenizer.json.

The file is a protocol buffer (google/sentencepiece, sentencepiece_model.proto); the few fields that
are needed are read here, so that nothing has to be installed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.common.errors import SourceError

# Kinds of tokens; SentencePiece and GGUF number them alike.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_UNIGRAM, _BPE = 1, 2
SPACE = "▁"


@dataclass(frozen=True)
class Pieces:
    """A vocabulary that llama.cpp's SentencePiece code merges by score.

    Attributes:
        texts: by token id.
        scores: by token id; of two possible merges the one with the higher score is done first.
        kinds: by token id.
        adds_space: whether a text gets a space in front.
    """

    texts: list[str]
    scores: list[float]
    kinds: list[int]
    adds_space: bool


def read_model_file(path: Path) -> Pieces:
    """Read a tokenizer.model.

    Raises:
        SourceError: it is damaged, or not of the kind that llama.cpp computes.
    """
    try:
        fields = list(_fields(path.read_bytes()))
        pieces = [dict(_fields(value)) for number, value in fields if number == 1]
        trainer = dict(_fields(dict(fields).get(2, b"")))
        normalizer = dict(_fields(dict(fields).get(3, b"")))
        texts = [piece[1].decode() for piece in pieces]
        scores = [struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0 for piece in pieces]
    except (IndexError, struct.error, KeyError, AttributeError, TypeError, ValueError) as error:
        raise SourceError(
            "the SentencePiece model is damaged", where=path, got=error,
            next_step="download it again",
        ) from error  # fmt: skip
    if trainer.get(3, _UNIGRAM) != _BPE:
        raise SourceError(
            "this kind of SentencePiece model cannot be exported",
            where=path,
            expected="BPE, as Llama and Mistral have",
            got=f"model_type {trainer.get(3, _UNIGRAM)}",
        )
    if normalizer.get(2) or normalizer.get(4, 1):
        raise SourceError(
            "this SentencePiece model rewrites texts, which llama.cpp would not",
            where=path,
            expected="no normalisation and no removal of spaces",
        )
    kinds = [int(piece.get(3, NORMAL)) for piece in pieces]
    return Pieces(texts, scores, kinds, bool(normalizer.get(3, 1)))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Field numbers and values of a message: integers, 4 or 8 bytes, or a string of bytes."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while position < len(data):
        key = varint()
        wire = key & 7
        if wire == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(wire)
        if size is None:
            if wire != 2:
                raise ValueError(f"wire type {wire}")
            size = varint()
        if position + size > len(data):
            raise ValueError("it ends in the middle of a field")
        yield key >> 3, data[position : position + size]
        position += size


def is_llama_form(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is a SentencePiece BPE vocabulary written as merges."""
    model = tokenizer["model"]
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def read_llama_form(tokenizer: Mapping[str, Any], where: Path) -> Pieces:
    """The vocabulary of a llama-style tokenizer.json, with scores that give the same merges.

    llama.cpp merges two neighbours whenever their text is in the vocabulary, the highest score
    first; tokenizers merges the pairs of its list, the first one first. The two agree when the list
    holds every such pair, all pairs of a text together: then a text's score is minus its place.

    Raises:
        SourceError: they do not agree, or texts are split or normalised in another way.
    """
    model = tokenizer["model"]
    adds_space = _adds_space(tokenizer, where)
    vocabulary: dict[str, int] = model["vocab"]
    specials = {token["content"] for token in tokenizer.get("added_tokens", [])}
    if model.get("ignore_merges") or not all(_byte(b) in vocabulary for b in range(256)):
        raise _unlike(where, "it has no token for each byte, or takes whole words first")
    places = _places(model["merges"], vocabulary, specials, where)
    size = max(vocabulary.values()) + 1
    texts = [f"[PAD{index}]" for index in range(size)]
    scores, kinds = [0.0] * size, [UNUSED] * size
    bytes_ = {_byte(b) for b in range(256)}
    for text, index in vocabulary.items():
        texts[index] = text
        scores[index] = -float(places.get(text, 0))
        kinds[index] = BYTE if text in bytes_ else NORMAL
    unknown = model.get("unk_token")
    if unknown in vocabulary:
        kinds[vocabulary[unknown]] = UNKNOWN
    return Pieces(texts, scores, kinds, adds_space)


def _byte(value: int) -> str:
    return f"<0x{value:02X}>"


def _places(
    merges: Sequence[Any], vocabulary: Mapping[str, int], specials: set[str], where: Path
) -> dict[str, int]:
    """The place of each merged text, after checking that scores can say what the list says."""
    places: dict[str, int] = {}
    pairs: dict[str, set[str]] = {}
    last = ""
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        text = left + right
        if text != last and text in places:
            raise _unlike(where, f"merges into {text!r} do not stand together")
        places.setdefault(text, len(places) + 1)
        pairs.setdefault(text, set()).add(left)
        last = text
    bytes_ = {_byte(b) for b in range(256)}
    usable = vocabulary.keys() - specials - bytes_
    for text in usable:
        possible = {
            text[:cut]
            for cut in range(1, len(text))
            if text[:cut] in usable and text[cut:] in usable
        }
        if possible != pairs.get(text, set()):
            raise _unlike(where, f"{text!r} could be merged in other ways than its list says")
    return places


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
