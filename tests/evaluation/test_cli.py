"""`hybridize evaluate` as a user runs it: the contract, resuming, and messages."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from converter.common.files import write_json
from tests.calibration.test_resume import started, wait_for_records
from tests.conftest import DEMO, run_cli

Capture = pytest.CaptureFixture[str]
SHORT = ("--lengths", "128", "--samples", 4, "--depths", 2, "--speed-runs", 0, "--batch", 4)


def evaluate(out: Path, *arguments: object) -> dict[str, Any]:
    """The report's JSON."""
    assert run_cli("evaluate", *arguments, "--out", out, "-q") == 0
    found: dict[str, Any] = json.loads((out / "evaluation.json").read_text())
    return found


def test_the_contract(numbers: dict[str, Any]) -> None:
    for one in (numbers, numbers["source"]):
        assert set(one["tasks"]) == {"recall", "mine-rows"}
        for task in one["tasks"].values():
            assert 0 <= task["low"] <= task["accuracy"] <= task["high"] <= 1
            assert task["n"] > 0
            assert task["low"] < task["high"]
        assert {"mean", "stderr"} <= set(one["perplexity"]) & set(one["kl"])
    assert numbers["source"]["kl"]["mean"] == 0
    assert numbers["kl"]["mean"] > 0


def test_the_numbers_belong_together(numbers: dict[str, Any]) -> None:
    hybrid = numbers["variants"]["hybrid"]
    mine = [item["answers"] for item in numbers["items"] if item["task"] == "recall"]
    scores = [answers["hybrid"]["score"] for answers in mine]
    before = [answers["original"]["score"] for answers in mine]
    assert len(scores) == 24 == hybrid["tasks"]["recall"]["n"]
    assert hybrid["tasks"]["recall"]["accuracy"] == pytest.approx(sum(scores) / 24)
    difference = sum(scores) / 24 - sum(before) / 24
    assert hybrid["tasks"]["recall"]["difference"]["mean"] == pytest.approx(difference)
    cells = hybrid["heatmaps"]["recall"]
    assert {(c["length_tokens"], c["depth"], c["n"]) for c in cells} == {
        (length, depth, 4) for length in (128, 256) for depth in (0, 0.5, 1)
    }
    assert sum(c["accuracy"] * c["n"] for c in cells) == pytest.approx(sum(scores))
    by_distance = hybrid["by_distance"]
    assert sum(row["n"] for row in by_distance) == 24
    assert by_distance[0]["above_tokens"] == 0
    assert all(a["up_to_tokens"] <= b["above_tokens"] for a, b in pairwise(by_distance))
    text = hybrid["text"]
    assert text["perplexity"]["mean"] == pytest.approx(math.exp(text["nll"]["mean"]))
    assert numbers["short_context"]["ok"]
    assert max(numbers["short_context"]["largest_logit_difference"].values()) == 0.0


def test_the_model_recalls_and_chance_does_not(numbers: dict[str, Any]) -> None:
    variants = numbers["variants"]
    recall = {name: v["tasks"]["recall"] for name, v in variants.items()}
    assert recall["original"]["accuracy"] >= 0.95
    assert recall["nll-restore 1/2"]["accuracy"] >= 0.8
    without = [n for n, v in variants.items() if 2 not in v["full_attention_layers"]]
    assert len(without) == 11
    for name in without:
        assert recall[name]["difference"]["high"] < -0.3, name
    same = [n for n, v in variants.items() if v["full_attention_layers"] == [2]]
    assert len(same) == 2
    assert recall[same[0]] == recall[same[1]]


def test_costs_fall_with_the_budget(numbers: dict[str, Any]) -> None:
    order = ("nll-restore 1/8", "hybrid", "nll-restore 1/2", "original")
    for key in ("kv_bytes", "prefill_flop"):
        costs = [numbers["variants"][name]["cost"][-1][key] for name in order]
        assert costs == sorted(costs)
        assert len(set(costs)) == 4
    speed = numbers["variants"]["hybrid"]["speed"]
    assert speed["prefill_seconds"] > 0 < speed["decode_seconds_per_token"]


def test_selectors_are_compared_at_equal_counts(numbers: dict[str, Any]) -> None:
    rows = numbers["selectors"]
    assert {row["full_layers"] for row in rows} == {1, 2, 4}
    for row in rows:
        assert len(row["full_attention_layers"]) == row["full_layers"]
        assert (row["difference"] is None) == (row["variant"] == row["against"])


def test_json_is_the_file_without_its_items_and_tables_say_the_same(
    demo_hybrid: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "report"
    written = evaluate(out, demo_hybrid, *SHORT, "--json")
    printed = json.loads(capsys.readouterr().out)
    assert len(written.pop("items")) == 4
    assert printed == written
    assert sorted(path.name for path in out.iterdir()) == ["evaluation.json", "report.html"]
    assert not (tmp_path / "report.work").exists()
    evaluate(out, demo_hybrid, *SHORT, "--force")
    text = capsys.readouterr().out
    assert "recall: accuracy [95% interval], paired difference to the original" in text
    assert "recall, hybrid: right answers by length and depth" in text
    assert "KV cache" in text
    assert "Within 16 tokens every plan computes what the original does" in text


def test_a_plain_model_and_a_source_run_apart(demo_hybrid: Path, tmp_path: Path) -> None:
    alone = evaluate(tmp_path / "plain", DEMO, *SHORT)
    both = evaluate(tmp_path / "apart", demo_hybrid, "--against", DEMO, *SHORT)
    assert list(alone["variants"]) == ["original"]
    assert alone["source"] is None
    assert both["source"]["tasks"]["recall"]["accuracy"] == alone["tasks"]["recall"]["accuracy"]
    for one, other in zip(alone["items"], both["items"], strict=True):
        mine, theirs = one["answers"]["original"], other["answers"]["original"]
        assert mine["text"] == theirs["text"]
        assert mine["nll"] == pytest.approx(theirs["nll"], abs=1e-5)


@pytest.mark.parametrize("mask", ["plain", "sinks and full decode"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_native_and_custom_forms(
    family: str, mask: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    text, rows = tmp_path / "mine.txt", tmp_path / "mine.jsonl"
    text.write_text("The river ran on past the mill. " * 60)
    rows.write_text(json.dumps({"prompt": "The river ran on past the" * 4, "answer": "mill"}))
    options = ("--tasks", "none", "--rows", rows, "--text", text, "--text-tokens", 200)
    found = evaluate(tmp_path / "report", checkpoint(family, mask), *options)
    assert found["short_context"]["ok"]
    assert found["kl"]["mean"] > 0.01
    assert found["perplexity"]["stderr"] > 0
    assert found["provenance"]["plan"]["full_attention_layers"] == [1, 2]


@pytest.mark.usefixtures("one_thread")
def test_a_killed_evaluation_resumes_to_the_same_numbers(demo_hybrid: Path, tmp_path: Path) -> None:
    options = ("--lengths", "128,256", "--samples", 16, "--batch", 4, "--speed-runs", 0, "-q")
    whole, out = tmp_path / "whole", tmp_path / "killed"
    evaluate(whole, demo_hybrid, *options)
    with started(2, "tasks", "evaluate", demo_hybrid, *options, "--out", out) as process:
        wait_for_records([tmp_path / "killed.work" / "tasks.jsonl"], 2, process)
    assert not out.exists()
    evaluate(out, demo_hybrid, *options)
    numbers, resumed = ((folder / "evaluation.json").read_text() for folder in (whole, out))
    assert resumed == numbers
    assert not (tmp_path / "killed.work").exists()


def test_work_of_another_evaluation_is_refused(
    demo_hybrid: Path, tmp_path: Path, capsys: Capture
) -> None:
    work = tmp_path / "work"
    arguments = ("evaluate", demo_hybrid, *SHORT, "-q", "--work", work)
    assert run_cli(*arguments, "--out", tmp_path / "a") == 0
    assert run_cli(*arguments, "--out", tmp_path / "b", "--seed", 1) == 2
    message = capsys.readouterr().err
    assert "the questions are others" in message
    assert "--fresh" in message
    assert run_cli(*arguments, "--out", tmp_path / "b", "--seed", 1, "--fresh") == 0


def test_a_model_that_answers_nothing_is_told(tmp_path: Path, capsys: Capture) -> None:
    """Its generation config calls every token the end of the text."""
    model = Path(shutil.copytree(DEMO, tmp_path / "silent"))
    write_json(model / "generation_config.json", {"eos_token_id": list(range(998))})
    assert run_cli("evaluate", model, *SHORT, "--out", tmp_path / "report", "-q") == 2
    message = capsys.readouterr().err
    assert "the model answers nothing" in message
    assert "generation config" in message
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--lengths", "289"), ("longer than the model's context", "at most 288")),
        (("--lengths", "20"), ("cannot hold the facts", "longer examples, by ")),
        (("--lengths", "many"), ("--lengths", "1024,4096")),
        (("--lengths", "0"), ("--lengths",)),
        (("--tasks", "niah_single_4"), ("no such task", "did you mean niah_single_")),
        (("--tasks", "niah_single_1", "--lengths", "150"), ("cannot hold an item",)),
        (("--tasks", "none", "--speed-runs", "0"), ("nothing to evaluate on",)),
        (("--rows", "EMPTY.jsonl"), ("the data set is empty", "EMPTY.jsonl")),
        (("--rows", "none.jsonl"), ("cannot be read", "No such file")),
        (("--text", "EMPTY.jsonl"), ("too short to measure language on",)),
        (("--text", "none.txt"), ("a text cannot be read",)),
        (("--text", "EMPTY.jsonl", "--text-tokens", "300"), ("at most 288",)),
        (("--haystack", "EMPTY.jsonl", "--tasks", "copy"), ("too few sentences",)),
        (("--budgets", "9"), ("more full-attention layers than the model has",)),
        (("--budgets", "1/4,kv:1B"), ("even when every layer slides", "at least kv:")),
        (("--plan", "none.json"), ("cannot be read",)),
        (("--against", "none"), ("there is no such model",)),
        (("--device", "toaster"), ("--device",)),
        ((DEMO, "--budgets", "1/4"), ("was not converted",)),
        ((DEMO, "--periodic"), ("was not converted",)),
        ((DEMO, "--against", DEMO), ("only a checkpoint",)),
        (("--against", "QWEN3"), ("was not made from this model",)),
    ],
)
def test_bad_input_is_told_before_any_work(
    options: tuple[object, ...],
    words: tuple[str, ...],
    demo_hybrid: Path,
    sources: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.chdir(tmp_path)
    options = tuple(sources["qwen3"] if option == "QWEN3" else option for option in options)
    (tmp_path / "EMPTY.jsonl").touch()
    model = () if DEMO in options else (demo_hybrid,)
    assert run_cli("evaluate", *model, *options, "--offline") == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "Traceback" not in message
    for word in words:
        assert word in message
    assert [path.name for path in tmp_path.iterdir()] == ["EMPTY.jsonl"]


def test_outputs_are_not_overwritten_unasked(
    demo_hybrid: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    arguments = ("evaluate", demo_hybrid, *SHORT, "-q", "--out", out)
    assert run_cli(*arguments) == 2
    assert run_cli(*arguments, "--force") == 2
    assert "this is something else" in capsys.readouterr().err
    assert (out / "thesis.txt").read_text() == "years of work"
    (out / "thesis.txt").unlink()
    assert run_cli(*arguments, "--force") == 0
    assert run_cli(*arguments) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_plan_that_breaks_its_window_fails(
    demo_hybrid: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Code that slides by a quarter of the window it claims: exit status 1."""
    broken = Path(shutil.copytree(demo_hybrid, tmp_path / f"broken-{tmp_path.name}"))
    code = broken / "modeling_hybrid.py"
    text = code.read_text()
    wrong = text.replace('int(module.config.hybrid["mask"]["window_tokens"])', "4")
    assert wrong != text
    code.write_text(wrong)
    arguments = ("evaluate", broken, *SHORT, "-q", "--out", tmp_path / "report")
    assert run_cli(*arguments) == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    # In a process of its own: the wrong attention would serve every later model of this one.
    command = [sys.executable, "-m", "converter", *map(str, arguments), "--trust-remote-code"]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 1
    found = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert not found["short_context"]["ok"]
    assert any("does not compute its mask" in line for line in found["findings"])
