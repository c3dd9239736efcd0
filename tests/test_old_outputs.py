"""What the version before this one wrote still loads, verifies and decides.

`tests/old_outputs/make.sh` made the files, with that version.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest

from converter.calibration.scores_file import load_scores
from converter.plan.plan import load_plan
from tests.conftest import run_cli

OLD = Path(__file__).parent / "old_outputs"
SCORES = ("scores", "scores-raced", "scores-lazy", "scores-beam")
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    with tarfile.open(OLD / "checkpoint.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("name", SCORES)
def test_scores_say_what_they_said(name: str) -> None:
    """Those by a method that is gone (beam) too."""
    written = json.loads((OLD / f"{name}.json").read_text(encoding="utf-8"))
    assert written["format_version"] == 3
    told = json.loads(json.dumps(load_scores(OLD / f"{name}.json").to_json()))
    assert told.pop("unit") == (
        "share of attention out of sight" if name == "scores-lazy" else "nats per answer token"
    )
    if written.get("contest"):
        # What is said of the comparison is found anew, and says more today.
        assert told["contest"]["finding"].startswith(written["contest"].pop("finding"))
        del told["contest"]["finding"]
    assert told == written


def test_a_plan_is_the_one_that_its_scores_decide(
    checkpoint: Path, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "plan.json"
    options = ("--scores", OLD / "scores.json", "--budget", "1/2", "--out", out, "-q")
    shutil.copy(checkpoint / "hybrid" / "source_config.json", checkpoint / "config.json")
    assert run_cli("plan", checkpoint, *options) == 0, capsys.readouterr().err
    old, new = load_plan(OLD / "plan.json"), load_plan(out)
    assert (new.layer_types, new.mask, new.ranking) == (old.layer_types, old.mask, old.ranking)


def test_a_checkpoint_is_retargeted_by_its_scores_and_computes_its_plan(
    checkpoint: Path, capsys: Captured
) -> None:
    """Its code is not this version's: that is told, it runs by this version's, and is replaced."""
    assert run_cli("verify", checkpoint, "-q", "--json", "--trust-remote-code") == 1
    checks = json.loads(capsys.readouterr().out)["checks"]
    failed = [check["name"] for check in checks if not check["ok"]]
    assert failed == ["Python files are this version's"]
    assert run_cli("run", checkpoint, "--prompt", "the", "--max-new", 2, "-q") == 0
    assert run_cli("retarget", checkpoint, "--budget", "1/2", "-q") == 0
    assert run_cli("verify", checkpoint, "-q", "--json") == 0, capsys.readouterr().out


def test_a_gguf_computes_the_plan_of_its_checkpoint(checkpoint: Path, capsys: Captured) -> None:
    command = ("verify", OLD / "model.gguf", "--against", checkpoint, "-q", "--json")
    assert run_cli(*command) == 0, capsys.readouterr().out
