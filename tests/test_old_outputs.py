"""What the version before this one wrote still loads, verifies and decides.

`tests/old_outputs/make.sh` made the files, with that version.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from converter.calibration.scores import load_scores
from converter.plan.plan import load_plan
from tests.conftest import run_cli

OLD = Path(__file__).parent / "old_outputs"
SCORES = ("scores", "scores-raced", "scores-lazy", "scores-beam")
Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize("name", SCORES)
def test_scores_say_what_they_said(name: str) -> None:
    """Those by a method that is gone (beam) too."""
    written = json.loads((OLD / f"{name}.json").read_text(encoding="utf-8"))
    assert written["format_version"] == 3
    told = load_scores(OLD / f"{name}.json").to_json()
    assert told.pop("unit") == (
        "share of attention out of sight" if name == "scores-lazy" else "nats per answer token"
    )
    assert told == written


def test_a_plan_is_the_one_that_its_scores_decide(tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "plan.json"
    options = ("--scores", OLD / "scores.json", "--budget", "1/2", "--out", out, "-q")
    source = tmp_path / "source"
    shutil.copytree(OLD / "checkpoint", source)
    shutil.copy(source / "hybrid" / "source_config.json", source / "config.json")
    assert run_cli("plan", source, *options) == 0, capsys.readouterr().err
    old, new = load_plan(OLD / "plan.json"), load_plan(out)
    assert (new.layer_types, new.mask, new.ranking) == (old.layer_types, old.mask, old.ranking)


def test_a_checkpoint_is_retargeted_by_its_scores_and_computes_its_plan(
    tmp_path: Path, capsys: Captured
) -> None:
    copied = tmp_path / "checkpoint"
    shutil.copytree(OLD / "checkpoint", copied)
    assert run_cli("verify", copied, "-q", "--json") == 0, capsys.readouterr().out
    assert run_cli("retarget", copied, "--budget", "1/2", "-q") == 0
    assert run_cli("verify", copied, "-q", "--json") == 0, capsys.readouterr().out


def test_a_gguf_computes_the_plan_of_its_checkpoint(capsys: Captured) -> None:
    command = ("verify", OLD / "model.gguf", "--against", OLD / "checkpoint", "-q", "--json")
    assert run_cli(*command) == 0, capsys.readouterr().out
