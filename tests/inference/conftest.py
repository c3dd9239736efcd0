"""What tests of several files run: models that share what plans have in common, and whole ones."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy
import pytest
import torch

from converter.inference.example import Example
from converter.inference.positions import LayerTypes
from converter.inference.runner import ModelRunner
from converter.model.mask import Mask
from tests.brute_force import EagerModel
from tests.conftest import Folders
from tests.runners import MASKS, Plain, resident


class Killed(Exception):  # noqa: N818 - stands for a kill
    """Raised where a process would have been killed."""


def killed(*_: object) -> None:
    """Take the place of a call before which it would have been."""
    raise Killed


Runners = Callable[..., ModelRunner]
Plains = Callable[..., Plain]


def assert_close(found: Any, expected: Any, within: float = 1e-12) -> None:
    """Equal numbers, but for what another order or alignment in memory does to sums."""
    numpy.testing.assert_allclose(found, expected, rtol=0, atol=within, equal_nan=False)


@pytest.fixture(scope="session")
def runner(folder: Folders) -> Runners:
    """A model with all layers in memory, by family and mask; not to be changed."""
    return cache(lambda family, mask="plain": resident(folder(family), MASKS[mask]))


@pytest.fixture(scope="session")
def plain(folder: Folders) -> Plains:
    """A model that computes everything, by family and mask."""
    return cache(lambda family, mask: Plain(folder(family), MASKS[mask]))


def whole_logits(
    model: EagerModel, example: Example, kinds: LayerTypes, mask: Mask
) -> torch.Tensor:
    """The brute force's logits of all rows of an example."""
    generated_from = len(example.prompt) if mask.full_attention_decode else None
    ids = [*example.prompt, *example.answer[:-1]]
    return model.logits(ids, kinds, mask.window_tokens, mask.sink_tokens, generated_from)


def rows_given_to_layers(runner: ModelRunner) -> list[int]:
    """Grows as the runner goes on, by the rows of each call of a layer's feed-forward block.

    The rows that only give keys do not get there.
    """
    rows: list[int] = []
    for layer in runner._modules.modules:  # type: ignore[union-attr]
        layer.mlp.register_forward_hook(
            lambda _module, given, _out: rows.append(given[0].shape[0] * given[0].shape[1])
        )
    return rows


def floats_left_by(run: Callable[[], object]) -> int:
    """How many numbers of tensors a call leaves in memory, without the garbage collector's help."""

    def floats() -> int:
        return sum(o.numel() for o in gc.get_objects() if type(o) is torch.Tensor)

    gc.collect()
    gc.disable()
    try:
        before = floats()
        run()
        return floats() - before
    finally:
        gc.enable()
