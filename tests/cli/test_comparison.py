"""Comparisons at the command line: lists of methods, kinds as profiles, kills and processes."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from converter.calibration.scores_file import load_scores
from converter.calibration.selectors import MEASURING
from converter.plan.plan import layer_types_of, load_plan
from tests.calibration.test_distributed import several, words_of
from tests.calibration.test_resume import started
from tests.conftest import DEMO, LAYERS, run_cli
from tests.held import records_of, wait_for_records
from tests.runners import random_rows

SAMPLES, VALIDATION = 8, 6
Captured = pytest.CaptureFixture[str]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many rows as are scored and compared on, and two more."""
    return random_rows(tmp_path_factory.mktemp("data"), SAMPLES + VALIDATION + 2, 100, seed=6)


@pytest.fixture(scope="module")
def command(sources: dict[str, Path], rows: Path) -> list[object]:
    """A calibration, without its --out and --method."""
    data = ("--data", rows, "--samples", SAMPLES, "--validation", VALIDATION, "--window", 16)
    return ["calibrate", sources["qwen3"], *data, "--budget", "1/2", "--device", "cpu"]


def read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def test_all_takes_every_method(command: list[object], tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "scores.json"
    assert run_cli(*command, "--method", "all", "--out", out) == 0
    printed, talk = capsys.readouterr()
    assert f"({SAMPLES} to score layers on, {VALIDATION} to compare choices on, 0 held" in talk
    comparison = read(out)["contest"]
    offsets = [f"periodic, offset {offset}" for offset in range(2)]
    names = [entry["name"] for entry in comparison["entries"]]
    assert sorted(names) == sorted([*MEASURING, *offsets])
    assert all(len(entry["nll"]) == VALIDATION for entry in comparison["entries"])
    for entry in comparison["entries"]:
        assert len(entry["full_attention_layers"]) == LAYERS // 2
        assert (entry["layer_forwards"] > 0) == (entry["name"] in MEASURING)
        assert entry["value"] == pytest.approx(sum(entry["nll"]) / VALIDATION)
        shown = {line.split(" ")[2] for line in printed.split("\n") if line.startswith("  ")}
        assert entry["name"].split(" ")[0] in shown
    assert f"plans of 2 full layers on up to {VALIDATION} validation examples" in printed
    assert comparison["finding"] in printed
    assert json.loads(json.dumps(load_scores(out).to_json())) == read(out)
    assert {path.name for path in tmp_path.iterdir()} == {"scores.json"}


def test_the_default_is_guided_search_against_the_paper(
    command: list[object], tmp_path: Path, capsys: Captured
) -> None:
    found, out = set(), tmp_path / "scores.json"
    for options in ((), ("--method", "best"), ("--method", "nll-restore,guided")):
        assert run_cli(*command, *options, "--out", out, "--force") == 0
        found.add(out.read_bytes())
    # So few examples are all read by the ranking too.
    assert len(found) == 1
    assert read(out)["fingerprint"]["methods"] == ["nll-restore", "guided"]
    assert f"passes of the model over each of {SAMPLES} examples" in capsys.readouterr().err


def test_what_wins_is_what_the_plan_and_the_checkpoint_keep(
    command: list[object], sources: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "scores.json"
    assert run_cli(*command, "--method", "lazy,kl,periodic", "--out", out, "-q") == 0
    comparison = read(out)["contest"]
    winner = min(comparison["entries"], key=lambda one: (one["value"], -one["layer_forwards"]))
    assert comparison["winner"] == winner["name"]
    plan = tmp_path / "plan.json"
    options = ("--scores", out, "--budget", "1/2", "-q")
    assert run_cli("plan", sources["qwen3"], *options, "--out", plan) == 0
    assert read(plan)["full_attention_layers"] == winner["full_attention_layers"]
    assert read(plan)["method"] == winner["name"]
    # Another number of layers was not compared: it is the method's whose scores these are.
    assert run_cli("plan", sources["qwen3"], *options, "--budget", 1, "--out", plan, "--force") == 0
    assert read(plan)["method"] == read(out)["method"] in ("lazy", "kl")
    assert run_cli("convert", sources["qwen3"], tmp_path / "out", *options, "--no-verify") == 0
    config = read(tmp_path / "out" / "config.json")
    assert config["hybrid"]["method"] == winner["name"]


def test_the_same_list_may_be_named_with_its_scores(
    command: list[object], sources: dict[str, Path], tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "scores.json"
    assert run_cli(*command, "--method", "best", "--out", out, "-q") == 0
    plan = ("plan", sources["qwen3"], "--scores", out, "-q")
    for method in ("best", "nll-restore,guided"):
        assert run_cli(*plan, "--method", method) == 0
    capsys.readouterr()
    for method in ("guided", "guided,nll-restore", "all"):
        assert run_cli(*plan, "--method", method) == 2
        assert "measured by another method" in capsys.readouterr().err


@pytest.mark.parametrize("options", [(), ("--method", "kl", "--budget", "nll:0.1")], ids=str)
def test_no_example_left_to_compare_on_is_said_before_anything_is_run(
    options: tuple[object, ...], command: list[object], tmp_path: Path, capsys: Captured
) -> None:
    assert run_cli(*command, *options, "--samples", 3000, "--out", tmp_path / "scores.json") == 2
    printed, error = capsys.readouterr()
    assert printed == ""
    assert error.startswith("error: no example is left to hold choices against each other on")
    usable = f"all {SAMPLES + VALIDATION + 2} usable examples are scored"
    assert all(words in error for words in ("--validation", usable, "lower --samples"))
    assert list(tmp_path.iterdir()) == []


def test_a_short_file_is_compared_on_before_any_is_held_out(
    sources: dict[str, Path], rows: Path, tmp_path: Path, capsys: Captured
) -> None:
    data = ("--data", rows, "--samples", 12, "--validation", 30, "--holdout", 30)
    options = (*data, "--window", 16, "--budget", "1/2", "--no-verify")
    assert run_cli("convert", sources["qwen3"], tmp_path / "out", *options) == 0
    talk = capsys.readouterr().err
    # As many are scored as compared on, while fewer are scored than were asked for.
    scored = math.ceil((SAMPLES + VALIDATION + 2) / 2)
    compared = SAMPLES + VALIDATION + 2 - scored
    assert f"({scored} to score layers on, {compared} to compare choices on, 0 held" in talk
    assert not (tmp_path / "out" / "hybrid" / "quality.json").exists()
    comparison = read(tmp_path / "out" / "hybrid" / "scores.json")["contest"]
    assert len(comparison["original"]["nll"]) == compared


@pytest.fixture(scope="module")
def by_kind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of the demonstration model, with an order for each kind."""
    out = tmp_path_factory.mktemp("kinds") / "scores.json"
    options = ("--window", 16, "--samples", 12, "--length", 256, "--exact", "--profiles")
    assert run_cli("calibrate", DEMO, *options, "--method", "nll-restore", "--out", out, "-q") == 0
    return out


def orders_by_hand(scores: dict[str, Any]) -> dict[str, list[int]]:
    """Of each kind, the layers by their mean score over its examples."""
    found = {}
    for kind in {example["kind"] for example in scores["per_example"]}:
        mine = [e["scores"] for e in scores["per_example"] if e["kind"] == kind]
        worth = [sum(column) for column in zip(*mine, strict=True)]
        found[kind] = sorted(range(len(worth)), key=lambda layer: -worth[layer])
    return found


def test_profiles_are_the_orders_of_the_kinds(by_kind: Path) -> None:
    scores = read(by_kind)
    assert scores["profiles"] == orders_by_hand(scores)
    assert scores["profiles"].keys() == {"pair", "link", "relation", "span"}
    assert len({tuple(order) for order in scores["profiles"].values()}) > 1


def test_a_plan_from_them_offers_every_kind(by_kind: Path, tmp_path: Path) -> None:
    expected = orders_by_hand(read(by_kind))
    for count in (0, 3, 8):
        out = tmp_path / f"{count}.json"
        options = ("--scores", by_kind, "--budget", count, "--out", out, "-q")
        assert run_cli("plan", DEMO, *options) == 0
        offered = {kind: tuple(sorted(order[:count])) for kind, order in expected.items()}
        assert load_plan(out).profiles == offered


def test_a_checkpoint_from_them_runs_as_any_kind_asks(by_kind: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    options = ("--scores", by_kind, "--budget", 3, "--no-verify", "-q")
    assert run_cli("convert", DEMO, out, *options) == 0
    for kind, order in orders_by_hand(read(by_kind)).items():
        model: Any = AutoModelForCausalLM.from_pretrained(
            out, trust_remote_code=True, dtype=torch.float32, profile=kind
        )
        assert model.config.layer_types == list(layer_types_of(order[:3], len(order)))


def test_a_conversion_that_measures_offers_them_too(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--window", 16, "--samples", 4, "--validation", 4, "--holdout", 0, "--length", 256)
    asked = ("--method", "nll-restore,nll-remove", "--profiles", "--budget", 2, "--no-verify", "-q")
    assert run_cli("convert", DEMO, out, *options, *asked) == 0
    scores = read(out / "hybrid" / "scores.json")
    assert scores["contest"]["keep"] == 2
    assert scores["profiles"].keys() == {"pair", "link", "relation", "span"}
    offered = {kind: tuple(sorted(order[:2])) for kind, order in scores["profiles"].items()}
    assert load_plan(out / "hybrid" / "plan.json").profiles == offered


COMPARED = ("--method", "nll-restore,guided")


@pytest.fixture(scope="module")
def undisturbed(
    command: list[object], tmp_path_factory: pytest.TempPathFactory
) -> tuple[bytes, dict[str, int]]:
    """The scores of a run that nobody killed, and how many records its logs held."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("undisturbed")
    options = ("--out", folder / "scores.json", "--work", folder / "work", "-q")
    assert run_cli(*command, *COMPARED, *options) == 0
    logs = {name: folder / "work" / f"{name}.jsonl" for name in ("scores", "validation")}
    counts = {name: len(records_of(log)) for name, log in logs.items()}
    return (folder / "scores.json").read_bytes(), counts


@pytest.mark.parametrize(
    ("stage", "at"),
    [("scores", 3), ("scores", -4), ("validation", 1)],
    ids=["first method", "last method", "comparison"],
)
def test_a_killed_comparison_resumes_to_the_same_file(
    stage: str,
    at: int,
    command: list[object],
    undisturbed: tuple[bytes, dict[str, int]],
    tmp_path: Path,
) -> None:
    truth, records = undisturbed
    out = tmp_path / "scores.json"
    arguments = (*command, *COMPARED, "--out", out)
    log = tmp_path / "scores.json.work" / f"{stage}.jsonl"
    count = at % records[stage]
    with started(count, stage, *arguments) as process:
        wait_for_records([log], count, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    found = records_of(log)
    assert len(found) == count and not out.exists()
    assert run_cli(*arguments, "--work", log.parent, "-q") == 0
    assert out.read_bytes() == truth
    # What was finished was not done again.
    assert records_of(log)[:count] == found
    assert len(records_of(log)) == records[stage]


def test_two_processes_compare_as_one_does(
    command: list[object], undisturbed: tuple[bytes, dict[str, int]], tmp_path: Path
) -> None:
    out, work = tmp_path / "scores.json", tmp_path / "work"
    arguments = [str(a) for a in (*command, *COMPARED, "--out", out, "--work", work)]
    with several(arguments, tmp_path / "logs") as process:
        _, talk = process.communicate(timeout=240)
        assert process.returncode == 0, talk
    assert out.read_bytes() == undisturbed[0]
    for title, records in undisturbed[1].items():
        parts = [records_of(work / f"{title}{rank}.jsonl") for rank in ("", ".rank1")]
        names = [{record["name"] for record in part} for part in parts]
        assert not names[0] & names[1]
        assert [len(part) for part in parts] == [records // 2] * 2
    assert words_of(tmp_path / "logs", 1) == {"stdout": "", "stderr": ""}
