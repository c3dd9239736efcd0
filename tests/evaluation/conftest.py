"""What several tests of evaluations look at."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from converter.evaluation.tasks.item import Prompter
from converter.inference.tokenizer import load_tokenizer
from converter.model.mask import Mask
from tests.conftest import make_tokenizer
from tests.hybrids import MASKS, WINDOW, rule

MASK_OF = {
    name: Mask(WINDOW, options.get("sinks", 0), options.get("full_decode", False))
    for name, options in MASKS.items()
}


@pytest.fixture(scope="module")
def numbers(evaluated: Path) -> dict[str, Any]:
    """The JSON of a report with everything in it."""
    value: dict[str, Any] = json.loads((evaluated / "evaluation.json").read_text())
    return value


def likeliest(
    reference: Any, choices: Sequence[tuple[Sequence[int], int]], kinds: list[str]
) -> int:
    """Of (token ids, where the choice begins), by the brute-force mask."""
    sums = []
    for ids, begin in choices:
        logits = reference.logits(ids[:-1], kinds, **rule("plain", begin))
        rows = logits.log_softmax(1)[begin - 1 :]
        sums.append(float(rows.gather(1, torch.tensor(ids[begin:])[:, None]).sum()))
    return sums.index(max(sums))


@pytest.fixture
def bytes_prompter(tmp_path: Path) -> Prompter:
    """One token a byte, no chat: needs nothing beside the checkout."""
    make_tokenizer(tmp_path)
    return Prompter(load_tokenizer(tmp_path))
