"""Without the optional packages: one clear message, and what does not need them works."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from converter.common.errors import GgufError
from converter.engines.gguf.sentencepiece import read_model_file
from tests.conftest import run_cli
from tests.ggufs import exported, hybrid_of


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("extra")
    checkpoint = hybrid_of(root, "qwen2")
    return checkpoint, exported(checkpoint, root / "good.gguf")


def test_without_llama_cpp_files_are_written_and_not_run(
    pair: tuple[Path, Path],
    tmp_path: Path,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    checkpoint, file = pair
    out = tmp_path / "out.gguf"
    for arguments in (
        ("run", file, "--prompt", "a"),
        ("verify", file, "--against", checkpoint),
        ("export", checkpoint, out, "--type", "q4_k_m"),
    ):
        message = refused(*arguments)
        assert "llama-cpp-python is not installed" in message
        assert "pip install" in message
    assert not out.exists()
    assert run_cli("export", checkpoint, out, "--type", "q8_0", "-q") == 0


def test_without_gguf_nothing_is_written_and_the_rest_works(
    pair: tuple[Path, Path],
    tmp_path: Path,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    checkpoint, out = pair[0], tmp_path / "out.gguf"
    message = refused("export", checkpoint, out)
    assert "gguf is not installed" in message and "pip install" in message
    assert not out.exists()
    source = checkpoint.parent / "qwen2-source"
    assert run_cli("inspect", source) == 0
    options = ("--layers", "1", "--window", "16", "--target", "llama.cpp", "-q")
    assert run_cli("convert", source, tmp_path / "other", *options) == 0


@pytest.mark.parametrize("package", ["sentencepiece", "google.protobuf.message"])
def test_without_sentencepiece_a_tokenizer_model_is_refused(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", raising=False)
    with pytest.raises(GgufError, match="pip install --upgrade sentencepiece protobuf"):
        read_model_file(tmp_path / "tokenizer.model")
