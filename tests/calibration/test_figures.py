"""The card's pictures: drawn where something was measured, and named by the card."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import pytest
from PIL import Image

from converter.calibration.figures import (
    CURVE_PICTURE,
    LAYERS_PICTURE,
    QUALITY_PICTURE,
    layer_map,
    pictures,
)
from converter.calibration.scores import ExampleScores, Scores
from converter.common.drawing import LIGHT
from converter.model.mask import Mask
from tests.conftest import DEMO, run_cli
from tests.publish.test_card import QUALITY, SCORES, plan_for, source

__all__ = ["source"]


def pictures_of(card: str) -> list[str]:
    return re.findall(r"!\[[^\]]+\]\(([^)]+)\)", card)


def test_a_measured_checkpoint_shows_them_all(demo_hybrid: Path) -> None:
    named = pictures_of((demo_hybrid / "README.md").read_text())
    assert named == [LAYERS_PICTURE, CURVE_PICTURE, QUALITY_PICTURE]
    for name in named:
        with Image.open(demo_hybrid / name) as picture:
            assert picture.format == "PNG" and picture.width >= 900
            # More than one colour: something is drawn.
            assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 8
    assert run_cli("verify", demo_hybrid, "-q", "--json") == 0


def test_a_checkpoint_by_given_layers_has_none(tmp_path: Path) -> None:
    out = tmp_path / "given"
    assert run_cli("convert", DEMO, out, "--layers", "2,5", "--window", 16, "-q") == 0
    assert pictures_of((out / "README.md").read_text()) == []
    assert not list((out / "hybrid").glob("*.png"))


@pytest.mark.parametrize("measured", ["scores", "quality", "both"])
def test_what_was_measured_is_drawn(measured: str, source: object) -> None:
    scores = None if measured == "quality" else SCORES
    quality = None if measured == "scores" else QUALITY
    plan = plan_for(source, SCORES.mask, 1)  # type: ignore[arg-type]
    drawn = pictures(plan, scores, quality, None)
    assert (LAYERS_PICTURE in drawn) == (scores is not None)
    assert (QUALITY_PICTURE in drawn) == (quality is not None)
    assert drawn == pictures(plan, scores, quality, None)


def test_bars_are_the_scores() -> None:
    rows = [(0.4, -0.2, 1.2), (0.6, -0.2, 1.8)]
    examples = tuple(ExampleScores("pair", 100, 4, 1.0, 3.0, row) for row in rows)
    scores = Scores("nll-restore", Mask(16), examples, 1.0, {}, (2, 0, 1))
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    axes = layer_map(scores, kinds, LIGHT).axes[0]
    bars = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in axes.patches}
    assert bars == {0: 0.5, 1: -0.2, 2: 1.5}
    reach = NormalDist().inv_cdf(0.975)
    intervals = [line.get_ydata() for line in axes.lines if len(set(line.get_xdata())) == 1]
    expected = [(m - e * reach, m + e * reach) for m, e in ((0.5, 0.1), (-0.2, 0), (1.5, 0.3))]
    assert [tuple(y) for y in intervals] == [pytest.approx(ends) for ends in expected]
    assert axes.get_xlabel() == "layer"
    searched = replace(scores, method="guided", order=(0, 2, 1))
    told = " ".join(layer_map(searched, kinds, LIGHT).axes[0].get_xlabel().split())
    assert "of one layer at a time; guided chose layers together" in told
