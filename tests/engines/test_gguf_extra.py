"""Without the optional packages: one clear message, and what does not need them works."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from converter.common.errors import GgufError
from converter.engines.gguf.sentencepiece import read_model_file
from tests.conftest import run_cli
from tests.ggufs import Files, Refused


def test_without_llama_cpp_files_are_written_and_not_run(
    hybrid: Files, gguf: Files, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, file = hybrid("qwen2"), gguf("qwen2")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    out = tmp_path / "out.gguf"
    for arguments in (
        ("run", file, "--prompt", "a"),
        ("verify", file, "--against", checkpoint),
        ("export", checkpoint, out, "--type", "q4_k_m"),
    ):
        message = refused(*arguments)
        assert "llama-cpp-python is not installed" in message and "pip install" in message
    assert not out.exists()
    assert run_cli("export", checkpoint, out, "--type", "q8_0", "-q") == 0


def test_without_gguf_nothing_is_written_and_the_rest_works(
    hybrid: Files, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, out = hybrid("qwen2"), tmp_path / "out.gguf"
    monkeypatch.setitem(sys.modules, "gguf", None)
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
