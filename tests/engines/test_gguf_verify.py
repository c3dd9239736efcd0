"""`hybridize verify FILE.gguf`: it finds what is wrong, and survives what crashes llama.cpp."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from converter.common.errors import GgufError
from converter.engines.gguf.container import read_container
from converter.engines.gguf.llama_cpp import LlamaCppSettings
from converter.engines.gguf.writer import GgufModel, write_model
from converter.model.families.stock_gguf import Value, array, integer
from tests.conftest import LAYERS
from tests.ggufs import Files, Pair, Refused, Told, exported, hybrid_of, loaded_gguf, rewritten
from tests.hybrids import WINDOW

Failed = Callable[[Path, Path], list[str]]


@pytest.fixture
def pair(hybrid: Files, gguf: Files) -> Pair:
    return hybrid("llama"), gguf("llama")


@pytest.fixture
def failed(told: Told) -> Failed:
    """Verifies a file against a checkpoint; the names of the checks that fail."""

    def names(file: Path, checkpoint: Path) -> list[str]:
        value = told("verify", file, "--against", checkpoint, status=1)
        assert value["ok"] is False
        return [check["name"] for check in value["checks"] if not check["ok"]]

    return names


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_k_m"])
def test_good_files_pass(kind: str, pair: Pair, tmp_path: Path, told: Told) -> None:
    file = exported(pair[0], tmp_path / "out.gguf", "--type", kind)
    value = told("verify", file, "--against", pair[0])
    assert value["ok"] is True and all(check["ok"] for check in value["checks"])
    names = {check["name"] for check in value["checks"]}
    rounded = "rounded weights stay nearer to the hybrid than full attention"
    assert (len(names), rounded in names) == ((10, False) if kind == "f32" else (9, True))


def test_another_plan_or_architecture_fails(pair: Pair, tmp_path: Path, failed: Failed) -> None:
    other = hybrid_of(tmp_path, "llama", "--layers", "0", "--window", WINDOW)
    assert failed(pair[1], other) == ["the plan is the checkpoint's"]
    file = exported(pair[0], tmp_path / "stock.gguf", "--stock-arch")
    assert failed(file, pair[0]) == ["the architecture honours it"]


def test_other_weights_or_another_vocabulary_fail(
    pair: Pair, tmp_path: Path, failed: Failed
) -> None:
    names = {"blk.0.ffn_up.weight": "blk.1.ffn_up.weight"}
    names |= {new: old for old, new in names.items()}
    file = rewritten(pair[1], tmp_path / "swapped.gguf", {}, names)
    assert failed(file, pair[0]) == ["logits are the hybrid's", "greedy decoding is the hybrid's"]

    key = "tokenizer.ggml.merges"
    merges = read_container(pair[1]).metadata[key].value
    file = rewritten(pair[1], tmp_path / "out.gguf", {key: array("string", merges[1:])})
    assert failed(file, pair[0]) == ["tokens of sample texts"]


PATTERN = "granite_swa.attention.sliding_window_pattern"
DAMAGE: dict[str, tuple[dict[str, Value | None], str]] = {
    "another window": ({"granite_swa.attention.sliding_window": integer(25)}, "contradicts"),
    "another pattern": ({PATTERN: array("bool", [True] * LAYERS)}, "contradicts"),
    "all zero, which aborts llama.cpp": ({PATTERN: array("bool", [False] * LAYERS)}, "contradicts"),
    "no pattern": ({PATTERN: None}, "contradicts"),
    "no plan": ({"hybridize.plan": None}, "not written by hybridize"),
    "a plan that is no plan": ({"hybridize.plan": Value("string", "[]")}, "damaged"),
    "no size": ({"granite_swa.attention.head_count": None}, "lacks a size"),
    "a size of two": ({"granite_swa.block_count": integer(2)}, "with tensors of 4 layers"),
}


def both(file: Path, checkpoint: Path) -> tuple[tuple[object, ...], ...]:
    return ("verify", file, "--against", checkpoint), ("run", file, "--prompt", "a")


@pytest.mark.parametrize("case", DAMAGE)
def test_files_that_contradict_themselves_are_refused(
    case: str, pair: Pair, tmp_path: Path, refused: Refused
) -> None:
    changes, words = DAMAGE[case]
    file = rewritten(pair[1], tmp_path / "out.gguf", changes)
    for command in both(file, pair[0]):
        assert words in refused(*command)


def test_files_that_are_no_whole_hybrid_are_refused(
    pair: Pair, tmp_path: Path, refused: Refused
) -> None:
    whole, file = pair[1].read_bytes(), tmp_path / "cut.gguf"
    for command in both(file, pair[0]):
        assert "cannot be read" in refused(*command)
    for length in (0, 3, 30, 100, 5_000, len(whole) // 2, len(whole) - 40):
        file.write_bytes(whole[:length])
        for command in both(file, pair[0]):
            assert "GGUF file" in refused(*command)
    container = read_container(pair[1])
    write_model(GgufModel("gpt2", {}, container.metadata, container.tensors), file)
    message = refused("verify", file, "--against", pair[0])
    assert "'gpt2'" in message and "step35" in message
    rewritten(pair[1], file, {}, {"blk.1.attn_q.weight": ""})
    for command in both(file, pair[0]):
        message = refused(*command)
        assert "does not load this file" in message and "blk.1.attn_q.weight" in message


def test_a_file_that_aborts_llama_cpp_is_one_message(gguf: Files, tmp_path: Path) -> None:
    """Such a pattern is refused before; here it meets llama.cpp where it can do no harm."""
    zeros = {"step35.attention.sliding_window_pattern": array("bool", [False] * LAYERS)}
    file = rewritten(gguf("qwen3"), tmp_path / "out.gguf", zeros)
    with pytest.raises(GgufError, match=r"llama\.cpp died") as caught:
        loaded_gguf(file, LlamaCppSettings(32))
    assert "SIGABRT" in caught.value.details["got"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "--against"),
        (("--against", "HYBRID", "--dtype", "float64"), "--dtype"),
        (("--against", "HYBRID", "--revision", "main"), "--revision"),
        (("--against", "."), "not a checkpoint"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense(
    options: tuple[str, ...], words: str, pair: Pair, refused: Refused
) -> None:
    given = [str(pair[0]) if option == "HYBRID" else option for option in options]
    assert words in refused("verify", pair[1], *given)


def test_changed_code_is_not_run(
    hybrid: Files, gguf: Files, tmp_path: Path, refused: Refused
) -> None:
    """A custom checkpoint needs its code; foreign code is not run without being told to."""
    checkpoint = Path(shutil.copytree(hybrid("olmo2"), tmp_path / "changed"))
    code = checkpoint / "modeling_hybrid.py"
    code.write_text(f"raise SystemExit(3)\n{code.read_text()}")
    assert "--trust-remote-code" in refused("verify", gguf("olmo2"), "--against", checkpoint)
