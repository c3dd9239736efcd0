"""What tests of several files run: models that share what plans have in common, and whole ones."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from converter.inference.runner import ModelRunner
from tests.runners import MASKS, Plain, resident


@pytest.fixture(scope="session")
def runner(folder: Callable[[str], Path]) -> Callable[..., ModelRunner]:
    """A model with all layers in memory, by family and mask; not to be changed."""
    return cache(lambda family, mask="plain": resident(folder(family), MASKS[mask]))


@pytest.fixture(scope="session")
def plain(folder: Callable[[str], Path]) -> Callable[[str, str], Plain]:
    """A model that computes everything, by family and mask."""
    return cache(lambda family, mask: Plain(folder(family), MASKS[mask]))


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
