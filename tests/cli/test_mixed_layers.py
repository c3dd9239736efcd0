"""Models whose layers are of several kinds, from the command line: only full ones are chosen."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from converter.calibration.scores_file import load_scores
from converter.common.errors import FamilyError
from converter.model.source import open_source
from tests.checkpoint.test_verify_tampering import make_manifest_fit
from tests.cli.test_convert import run_json
from tests.conftest import MIXED_FAMILIES, make_model, run_cli, three_to_one
from tests.tiny import config_of

WINDOW = 16
KINDS = ["linear_attention", "full_attention", "linear_attention"] * 2


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers, of which 1 and 4 attend fully."""
    folder = tmp_path_factory.mktemp("mixed") / "m"
    return make_model(folder, "qwen3_5_text", num_hidden_layers=6, layer_types=KINDS)


@pytest.fixture(scope="module")
def measured(source: Path) -> Path:
    out = source.parent / "out"
    options = (
        "--samples",
        4,
        "--holdout",
        2,
        "--validation",
        2,
        "--length",
        400,
        "--budget",
        "1/2",
    )
    methods = ("--method", "nll-restore,guided", "--window", WINDOW, "--no-verify", "-q")
    assert run_cli("convert", source, out, *options, *methods) == 0
    return out


def test_a_measured_curve_is_shown_again(source: Path, measured: Path) -> None:
    curve = run_json("plan", source, "--curve", measured / "hybrid" / "curve.json")
    assert [point["full_attention_layers"] for point in curve["points"]][-1] == [1, 4]


def edit(path: Path, change: Any) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_scores_and_plans_name_the_layers_of_the_model(source: Path, measured: Path) -> None:
    scores = load_scores(measured / "hybrid" / "scores.json")
    assert (scores.numbers, scores.units.total) == ((1, 4), 2)
    saved = json.loads((measured / "hybrid" / "scores.json").read_text())
    assert [layer["index"] for layer in saved["layers"]] == [1, 4]
    assert sorted(scores.order) == [1, 4]
    config = json.loads((measured / "config.json").read_text())
    assert config["layer_types"] == KINDS
    assert "sliding_window" not in config
    (kept,) = (i for i, kind in enumerate(config["hybrid"]["layer_types"]) if kind in KINDS[1])
    assert kept == scores.order[0]
    assert config["hybrid"]["ranking"] == list(scores.order)
    told = run_json("plan", source, "--scores", measured / "hybrid" / "scores.json")
    assert told["full_attention_layers"] == [scores.order[0]]
    assert run_cli("retarget", measured, "--budget", 2, "-q") == 0
    assert run_cli("retarget", measured, "--budget", 3, "-q") == 2


def test_budgets_and_periods_are_of_the_full_layers(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    periodic = ("plan", source, "--method", "periodic", "--window", WINDOW)
    told = [run_json(*periodic, "--budget", "1/2", "--offset", i) for i in (0, 1)]
    assert [plan["full_attention_layers"] for plan in told] == [[1], [4]]
    shape = open_source(str(source)).shape
    cost = told[0]["kv_bytes"]
    full, slides = 512 * shape.kv_bytes_per_token, WINDOW * shape.kv_bytes_per_token
    assert cost["full"] == 2 * full + 4 * shape.state_bytes
    assert cost["hybrid"] == full + slides + 4 * shape.state_bytes
    assert run_cli("plan", source, "--layers", "0,1", "--window", WINDOW) == 2
    error = capsys.readouterr().err
    assert "does not attend fully in the model itself" in error
    assert "0 (linear_attention)" in error
    assert run_cli("inspect", source, "--window", WINDOW) == 0
    assert "6 layers (4 recurrent, 2 full)" in capsys.readouterr().out


def test_three_recurrent_layers_to_each_full_one_are_scored_converted_and_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Qwen3.5 is published, whose configuration may say no more than every fourth."""
    source, scores, out = three_to_one(tmp_path / "m"), tmp_path / "scores.json", tmp_path / "out"
    asked = ("--samples", 2, "--validation", 2, "--length", 400, "--window", WINDOW, "-q")
    options = ("--method", "nll-restore,nll-remove,guided", "--budget", 1, "--out", scores)
    assert run_cli("calibrate", source, *options, *asked) == 0
    assert sorted(load_scores(scores).order) == [3, 7]
    assert run_cli("convert", source, out, "--scores", scores, "--no-verify", "-q") == 0
    kinds = json.loads((out / "config.json").read_text())["hybrid"]["layer_types"]
    assert sorted(kinds[3::4]) == ["full_attention", "sliding_attention"]
    assert kinds[:3] == kinds[4:7] == ["linear_attention"] * 3
    capsys.readouterr()
    assert run_json("verify", out)["ok"]
    assert run_cli("run", out, "--prompt", "ab" * WINDOW, "--max-new", 4, "-q") == 0


def slide_another(config: dict[str, Any]) -> None:
    types = config["hybrid"].get("layer_types") or config["layer_types"]
    types[1], types[3] = types[3], types[1]


def widen_own_windows(config: dict[str, Any]) -> None:
    """Those of the layers that no plan changes."""
    config["sliding_window"] += 1


NEW_FULL = ("seed_oss", "ministral3", "glm4_moe", "minimax_m2")
TAMPERINGS = [
    *((family, slide_another) for family in (*NEW_FULL, *MIXED_FAMILIES)),
    *((f, widen_own_windows) for f, config in MIXED_FAMILIES.items() if "sliding_window" in config),
]


@pytest.mark.parametrize(("family", "tampering"), TAMPERINGS)
def test_a_changed_configuration_is_caught(family: str, tampering: Any, tmp_path: Path) -> None:
    source, out = make_model(tmp_path / "m", family), tmp_path / "out"
    options = ("--layers", "1", "--window", WINDOW, "--no-verify", "-q")
    assert run_cli("convert", source, out, *options) == 0
    edit(out / "config.json", tampering)
    make_manifest_fit(out)
    with redirect_stdout(StringIO()) as told:
        assert run_cli("verify", out, "--json") == 1
    failed = {c["name"] for c in json.loads(told.getvalue())["checks"] if not c["ok"]}
    assert "sizes and hashes" not in failed
    assert {"config.json says the plan", "plan past the window, trusted"} <= failed


def all_of(value: Any) -> set[str]:
    """Every key of a JSON value, and every text in it, at any depth."""
    if isinstance(value, dict):
        return set(value).union(*map(all_of, value.values()))
    if isinstance(value, list):
        return set().union(*map(all_of, value))
    return {value} if isinstance(value, str) else set()


def test_a_model_whose_layers_all_attend_fully_is_written_as_before(demo_hybrid: Path) -> None:
    """Nothing in its files is of other kinds of layers: the words are those of a mixed model's."""
    files = [demo_hybrid / "config.json", *(demo_hybrid / "hybrid").glob("*.json")]
    said = {file.name: all_of(json.loads(file.read_text())) for file in files}
    assert {"config.json", "plan.json", "scores.json", "manifest.json"} <= said.keys()
    apart = {"linear_attention", "own_sliding_attention", "text_config", "kinds"}
    assert {name: words & apart for name, words in said.items() if words & apart} == {}
    assert "layer_types" not in json.loads(files[0].read_text())["hybrid"]


GEMMA4 = {
    "model_type": "gemma4_text",
    "hidden_size_per_layer_input": 0,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"layer_types": ["full_attention"] * 3 + ["hybrid"]}, "hybrid"),
        ({"layer_types": ["full_attention"] * 3}, "3 layers"),
        ({"linear_key_head_dim": 0}, "linear_key_head_dim"),
        ({"full_attention_interval": "4"}, "full_attention_interval"),
        ({"model_type": "olmo3", "sliding_window": 1}, "no window"),
        ({"model_type": "exaone4", "sliding_window_pattern": "LLLG"}, "sliding_window_pattern"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "looks forward"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "caps"),
        (GEMMA4 | {"hidden_size_per_layer_input": None}, "embedding of its own"),
        (GEMMA4 | {"num_kv_shared_layers": 2}, "share the keys"),
        (GEMMA4 | {"use_bidirectional_attention": "all"}, "looks forward"),
        (GEMMA4 | {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, "last layer"),
        (GEMMA4 | {"global_head_dim": "512"}, "heads are '512'"),
        (GEMMA4 | {"per_layer_config": {"0": {"head_dim": 16}}}, "not one for all"),
        (GEMMA4 | {"enable_moe_block": True}, "experts"),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, "save its lang"),
        ({"model_type": "llama4", "text_config": {"model_type": "llama4_text"}}, "text only"),
    ],
    ids=str,
)
def test_what_cannot_be_converted_is_refused(
    config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(config_of(**({"model_type": "qwen3_5_text"} | config)))
    )
    with pytest.raises(FamilyError) as caught:
        open_source(str(folder))
    assert reason in str(caught.value)
