"""Families beyond the first four: every mask, through the same generic code."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import MORE_FAMILIES, make_model, run_cli

MASKS = {
    "plain": (),
    "sinks and full decode": ("--sinks", "3", "--full-decode"),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_a_family_converts_and_verifies(family: str, mask: str, tmp_path: Path) -> None:
    source = make_model(tmp_path / family, family)
    out = tmp_path / "out"
    options = ("--layers", "1", "--window", "16", *MASKS[mask])
    assert run_cli("convert", source, out, *options, "--verify") == 0
