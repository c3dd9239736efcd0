"""What several tests of evaluations look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from converter.evaluation.tasks.item import Prompter
from converter.inference.tokenizer import load_tokenizer
from tests.conftest import make_tokenizer


@pytest.fixture(scope="module")
def numbers(evaluated: Path) -> dict[str, Any]:
    """The JSON of a report with everything in it."""
    value: dict[str, Any] = json.loads((evaluated / "evaluation.json").read_text())
    return value


@pytest.fixture
def bytes_prompter(tmp_path: Path) -> Prompter:
    """One token a byte, no chat: needs nothing beside the checkout."""
    make_tokenizer(tmp_path)
    return Prompter(load_tokenizer(tmp_path))
