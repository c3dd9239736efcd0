"""Plans of KV heads from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from converter.model.mask import FULL, SLIDING
from converter.plan.plan import load_plan
from converter.plan.units import Units
from tests.conftest import LAYERS, run_cli
from tests.kv_heads import KV_HEADS, grouped_model

UNITS = Units(LAYERS, KV_HEADS)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return grouped_model(tmp_path_factory.mktemp("grouped") / "model")


def test_the_whole_line_from_calibration_to_a_proved_checkpoint(
    grouped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores, plan, out = tmp_path / "scores.json", tmp_path / "plan.json", tmp_path / "out"
    data = ("--samples", 2, "--length", 300, "--window", 8, "--device", "cpu", "-q")
    heads = ("--granularity", "kv-head")
    asked = ("--method", "path-integral", *heads, "--out", scores)
    assert run_cli("calibrate", grouped, *asked, *data) == 0
    assert run_cli("plan", grouped, "--scores", scores, "--budget", 3, "--out", plan) == 0
    value = json.loads(plan.read_text())
    order = json.loads(scores.read_text())["order"]
    assert value["layer_types"] == list(UNITS.types(order[:3]))
    assert sorted(value["ranking"]) == list(range(16))
    capsys.readouterr()
    convert = ("convert", grouped, out, "--scores", scores, "--budget", 3)
    assert run_cli(*convert, "--verify") == 0
    assert "it computes its plan" in capsys.readouterr().out
    card = (out / "README.md").read_text()
    for head, strip in enumerate(load_plan(out / "hybrid" / "plan.json").head_strips(KV_HEADS)):
        assert f"{strip}    KV head {head}\n" in card
    assert run_cli("retarget", out, "--budget", "1/2", "-q") == 0
    retargeted = json.loads((out / "hybrid" / "plan.json").read_text())
    assert retargeted["layer_types"] == list(UNITS.types(order[:8]))
    assert run_cli("verify", out, "--against", grouped, "-q") == 0
    assert run_cli("retarget", out, "--layers", "1,2", "-q") == 0
    assert json.loads((out / "config.json").read_text())["layer_types"] == [
        SLIDING,
        *[FULL] * 2,
        SLIDING,
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--method", "lazy"), "a method cannot tell the KV heads of a layer apart"),
        (("--method", "guided", "--profiles"), "plans of KV heads are chosen for all inputs"),
        (("--target", "vllm"), "vLLM would not honour this plan"),
        (("--target", "llama.cpp"), "llama.cpp cannot honour this plan"),
        (("--budget", "17"), "more full-attention KV heads than the model has"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_chosen_by_heads_is_refused_before_anything_is_measured(
    options: tuple[str, ...],
    said: str,
    grouped: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "scores.json"
    asked = ("--granularity", "kv-head", "--window", 8, "--out", out)
    assert run_cli("calibrate", grouped, *asked, *options) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
