"""Checkpoints and their GGUF files, and commands by what they say."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from tests.conftest import run_cli
from tests.ggufs import Files, Refused, Told, exported, hybrid_of


@pytest.fixture(scope="session")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A checkpoint of each family; not to be changed."""
    root = tmp_path_factory.mktemp("gguf-hybrids")
    return cache(lambda family: hybrid_of(root, family))


@pytest.fixture(scope="session")
def gguf(hybrid: Files, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Each of them as GGUF in float32."""
    root = tmp_path_factory.mktemp("ggufs")
    return cache(lambda family: exported(hybrid(family), root / f"{family}.gguf", "--type", "f32"))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that refuses; its message, which is all that it says."""

    def message(*arguments: object) -> str:
        capsys.readouterr()
        assert run_cli(*arguments) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        return printed.err

    return message


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    """Runs a command; the JSON object that it prints."""

    def value(*arguments: object, status: int = 0) -> Any:
        capsys.readouterr()
        assert run_cli(*arguments, "--json", "-q") == status
        return json.loads(capsys.readouterr().out)

    return value
