"""Tokenizers in GGUF: llama.cpp makes the same tokens, or the export is refused."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.common.errors import SourceError
from converter.engines.gguf.container import read_container
from converter.engines.gguf.llama_cpp import LlamaCppSettings
from converter.engines.gguf.sentencepiece import Vocabulary, read_llama_form, read_model_file
from converter.engines.gguf.tokenizer import PROBE, load_fast, pre_tokenizer
from converter.engines.gguf.verify import _TEXTS as TEXTS
from tests.conftest import make_model, run_cli, shared
from tests.ggufs import RULE, Refused, exported, hybrid_of, loaded_gguf, make_bpe_tokenizer

# Beside the texts that `verify` tries: spellings that the tokenizers must not take apart.
SAMPLE = (*TEXTS, "they're GOING", "the there thing\n\n  the", "a\u00e1b", "123456 the 7")
BOTH = ("tokenizer.json", "tokenizer_config.json")


def with_tokenizer(folder: Path, files: dict[str, Path], rows: int) -> Path:
    """A small model with somebody else's tokenizer, as GGUF."""
    source, out = folder / "source", folder / "hybrid"
    changes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32}
    make_model(source, "llama", vocab_size=rows, rope_parameters=None, **changes)
    (source / "tokenizer.json").unlink()
    for name, path in files.items():
        shutil.copyfile(path, source / name)
    # The files are read here without transformers, which the conversion does not need either.
    assert run_cli("convert", source, out, "--layers", "0", "--window", "16", "-q", "--json") == 0
    return exported(out, folder / "out.gguf")


def tokens_of(file: Path, texts: tuple[str, ...]) -> list[list[int]]:
    with loaded_gguf(file, LlamaCppSettings(32)) as engine:
        return [engine.tokenize(text, around=True) for text in texts]


def vectors(name: str) -> tuple[tuple[str, ...], list[list[int]]]:
    """llama.cpp's own test vectors: texts and ids."""
    inputs = shared(f"tokenizers/vectors/{name}.inp").read_text(encoding="utf-8")
    outputs = shared(f"tokenizers/vectors/{name}.out").read_text(encoding="utf-8")
    texts = tuple(inputs.split("\n__ggml_vocab_test__\n"))
    ids = [[int(word) for word in line.split()] for line in outputs.split("\n")]
    return texts, ids[: len(texts)]


@pytest.mark.shared
@pytest.mark.parametrize(
    ("folder", "vector", "rows", "name"),
    [("qwen3", "qwen2", 151936, "qwen2"), ("gpt2", "gpt-2", 50257, "gpt-2")],
)
def test_real_byte_level_tokenizers(
    folder: str, vector: str, rows: int, name: str, tmp_path: Path
) -> None:
    files = {name: shared(f"tokenizers/{folder}/{name}") for name in BOTH}
    file = with_tokenizer(tmp_path, files, rows)
    assert read_container(file).metadata["tokenizer.ggml.pre"].value == name
    texts, ids = vectors(vector)
    found = tokens_of(file, (*texts, *SAMPLE))
    reference = load_fast(files["tokenizer.json"])
    assert found[: len(texts)] == ids
    assert found == [reference.encode(text).ids for text in (*texts, *SAMPLE)]


@pytest.mark.shared
@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.model.v1",
        *(f"mistral_instruct_tokenizer_{v}" for v in ("240216.model.v2", "240323.model.v3")),
    ],
)
def test_real_sentencepiece_models(name: str, tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    path = shared(f"tokenizers/mistral/{name}")
    reference: Any = SentencePieceProcessor(model_file=str(path))
    file = with_tokenizer(tmp_path, {"tokenizer.model": path}, reference.vocab_size())
    texts = tuple(text for text in (*vectors("qwen2")[0], *SAMPLE) if text)
    expected = [[reference.bos_id(), *reference.encode(text)] for text in texts]
    assert tokens_of(file, texts) == expected


@pytest.mark.shared
def test_a_real_llama_style_tokenizer_json(tmp_path: Path) -> None:
    files = {name: shared(f"tokenizers/mistral/{name}") for name in BOTH}
    path, file = files["tokenizer.json"], with_tokenizer(tmp_path, files, 32000)
    novel = shared("texts/pride_and_prejudice.md").read_text(encoding="utf-8")[:60_000]
    texts = (*(text for text in vectors("qwen2")[0] if text), *SAMPLE, novel)
    reference = load_fast(path)
    assert tokens_of(file, texts) == [reference.encode(text).ids for text in texts]
    # The scores need not be SentencePiece's, but order merged pieces as they do.
    pieces = read_llama_form(json.loads(path.read_text(encoding="utf-8")), path)
    known = read_model_file(shared("tokenizers/mistral/tokenizer.model.v1"))
    merged = [i for i, score in enumerate(pieces.scores) if score]
    assert len(merged) > 28_000
    ours, theirs = (sorted(merged, key=lambda i: -p.scores[i]) for p in (pieces, known))
    assert ours == theirs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_bpe_tokenizer(tmp_path)
    return tmp_path / "tokenizer.json"


def named(path: Path, **changes: Any) -> str | None:
    """The pre-tokenizer's name after changes to the file."""
    contents = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(contents), encoding="utf-8")
    return pre_tokenizer(load_fast(path).encode(PROBE).ids, contents)


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def test_unseen_vocabularies_are_named_by_their_rule(folder: Path) -> None:
    assert named(folder) == "qwen2"
    contents = json.loads(folder.read_text(encoding="utf-8"))
    steps = contents["pre_tokenizer"]["pretokenizers"]
    steps[0]["pattern"]["Regex"] = steps[0]["pattern"]["Regex"].replace("\\p{N}|", "\\p{N}{1,3}|")
    assert named(folder, pre_tokenizer=contents["pre_tokenizer"]) == "llama-bpe"
    assert named(folder, pre_tokenizer=BYTES) == "gpt-2"


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": BYTES | {"add_prefix_space": True}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, BYTES]}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"normalizer": {"type": "Lowercase"}},
    ],
    ids=str,
)
def test_rules_that_llama_cpp_has_no_name_for(changes: dict[str, Any], folder: Path) -> None:
    assert named(folder, **changes) is None


def test_tokenizers_that_cannot_be_exported_are_refused(tmp_path: Path, refused: Refused) -> None:
    checkpoint = hybrid_of(tmp_path, "qwen3")
    path = checkpoint / "tokenizer.json"
    whole = path.read_text(encoding="utf-8")
    contents = json.loads(whole)
    model = contents["model"]
    models = (
        {"type": "WordLevel", "vocab": {}, "unk_token": "a"},
        model | {"merges": []},
        model | {"vocab": model["vocab"] | {"zzz": 100_000}},
        model | {"merges": [["nowhere", "to"]]},
    )
    other_rule = whole.replace(json.dumps(RULE)[1:-1], "[a-z]+|.")
    for text in (other_rule, "{", *(json.dumps(contents | {"model": model}) for model in models)):
        path.write_text(text, encoding="utf-8")
        message = refused("export", checkpoint, tmp_path / "out.gguf")
        assert "tokenizer" in message
        assert text != other_rule or ("unknown hash" in message and "--from-gguf" in message)
        assert not (tmp_path / "out.gguf").exists()


def model_file(path: Path, **normalizer: Any) -> Any:
    """A tokenizer.model of three tokens; its message, to be changed and written again."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto()
    for text, score, kind in (("<unk>", 0, 2), ("▁a", -1, 1), ("a", -2, 1)):
        model.pieces.add(piece=text, score=score, type=kind)
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.normalizer_spec.remove_extra_whitespaces = False
    for name, value in normalizer.items():
        setattr(model.normalizer_spec, name, value)
    path.write_bytes(model.SerializeToString())
    return model


def test_a_sentencepiece_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    model_file(path)
    vocabulary = Vocabulary(["<unk>", "▁a", "a"], [0.0, -1.0, -2.0], [2, 1, 1], True)
    assert read_model_file(path) == vocabulary
    model_file(path, add_dummy_prefix=False)
    assert not read_model_file(path).adds_space


def test_sentencepiece_files_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    model = model_file(path)
    good = path.read_bytes()
    model.trainer_spec.model_type = model.trainer_spec.UNIGRAM
    spaces = model_file(path, remove_extra_whitespaces=True).SerializeToString()
    normalised = model_file(path, precompiled_charsmap=b"map").SerializeToString()
    for data, words in (
        (good[:-1], "is damaged"),
        (b"\xff" * 40, "is damaged"),
        (good.replace("▁a".encode(), b"\xff\xff\xffa"), "not UTF-8"),
        (model.SerializeToString(), "expected: BPE"),
        (spaces, "rewrites"),
        (normalised, "rewrites"),
    ):
        path.write_bytes(data)
        with pytest.raises(SourceError, match=words):
            read_model_file(path)


@given(st.binary(max_size=80), st.integers(0, 60))
def test_any_sentencepiece_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, start: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.model"
    model_file(path)
    good = path.read_bytes()
    path.write_bytes(good[:start] + noise + good[start + len(noise) :])
    with contextlib.suppress(SourceError):
        read_model_file(path)


def llama_form(**changes: Any) -> dict[str, Any]:
    """A llama-style tokenizer.json: bytes, letters and two merges."""
    words = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *"▁abc", "ab", "abc", "▁abc"]
    merges = [["a", "b"], ["ab", "c"], ["▁", "abc"]]
    vocabulary = {word: index for index, word in enumerate(words)}
    model = {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "vocab": vocabulary}
    steps = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
    model |= {"merges": merges} | changes.pop("model", {})
    whole = {
        "model": model,
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "added_tokens": [],
    }
    return whole | changes


def test_the_llama_form_gives_scores_in_the_order_of_its_merges(tmp_path: Path) -> None:
    pieces = read_llama_form(llama_form(), tmp_path)
    by_text = dict(zip(pieces.texts, pieces.scores, strict=True))
    assert 0 > by_text["ab"] > by_text["abc"] > by_text["▁abc"]
    assert pieces.adds_space


@pytest.mark.parametrize(
    "changes",
    [
        # "ab" + "c" is in the vocabulary, and the list does not merge it.
        {"model": {"merges": [["a", "b"], ["▁", "abc"]]}},
        # The merges into one text do not stand together: no one score says that.
        {"model": {"merges": [["a", "b"], ["ab", "c"], ["a", "b"], ["▁", "abc"]]}},
        {"model": {"ignore_merges": True}},
        {"normalizer": {"type": "NFKC"}},
        {"pre_tokenizer": {"type": "Metaspace", "split": True}, "normalizer": None},
    ],
    ids=str,
)
def test_llama_forms_that_scores_cannot_say_are_refused(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=r"llama\.cpp would not tokenize"):
        read_llama_form(llama_form(**changes), tmp_path)
