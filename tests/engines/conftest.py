"""Commands, by what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import run_cli


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that refuses; its message, which is all that it says."""

    def message(*arguments: object) -> str:
        capsys.readouterr()
        assert run_cli(*arguments) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        return printed.err

    return message


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs a command; the JSON object that it prints."""

    def value(*arguments: object, status: int = 0) -> Any:
        capsys.readouterr()
        assert run_cli(*arguments, "--json", "-q") == status
        return json.loads(capsys.readouterr().out)

    return value
