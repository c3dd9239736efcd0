"""lm-eval runs our loaded model, offline, on a task made here."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from converter.inference.tokenizer import load_tokenizer
from tests.conftest import DEMO, make_tokenizer, run_cli
from tests.evaluation.conftest import likeliest
from tests.hybrids import KEPT, PLAN

Capture = pytest.CaptureFixture[str]
TASK = """task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
ROWS: list[dict[str, Any]] = [
    {"question": f"{letter * 70} is", "choices": ["one", "two", "six"], "answer": i % 3}
    for i, letter in enumerate("abcdefghijkl")
]


@pytest.fixture
def lm_eval_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(TASK.format(rows=rows))
    return tmp_path / "tasks"


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval is not installed (pip install hybridize[lm-eval])",
)
@pytest.mark.filterwarnings("default")
def test_the_harness_scores_the_plan_on_the_tasks_it_has(
    lm_eval_tasks: Path,
    checkpoint: Callable[..., Path],
    eager: Callable[[str], Any],
    tmp_path: Path,
    capsys: Capture,
) -> None:
    """Its accuracy is that of log-likelihoods by the brute-force mask."""
    out = tmp_path / "report"
    plain = ("evaluate", checkpoint("qwen3", "plain"), "--tasks", "none", "--speed-runs", 0)
    options = ("--dtype", "float64", "--out", out, "--harness-tasks", lm_eval_tasks)
    assert run_cli(*plain, *options, "--harness", "no_such_task") == 2
    assert "lm-eval has no such task" in capsys.readouterr().err
    options = (*options, "--fresh", "--harness-limit", 9)
    assert run_cli(*plain, *options, "--harness", "local_choice") == 0
    assert "lm-eval local_choice" in capsys.readouterr().out
    found = json.loads((out / "evaluation.json").read_text())
    make_tokenizer(tmp_path)
    encode = load_tokenizer(tmp_path).encode
    full = ["full_attention"] * len(PLAN)
    for name, kinds in {"original": full, "hybrid": PLAN}.items():
        right = 0
        for row in ROWS[:9]:
            question = encode(row["question"])
            choices = [([*question, *encode(f" {c}")], len(question)) for c in row["choices"]]
            right += likeliest(eager("qwen3"), choices, kinds) == row["answer"]
        value = found["variants"][name]["harness"]["local_choice"]
        assert value["n"] == 9
        assert value["metrics"]["acc"]["value"] == pytest.approx(right / 9)
        assert value["metrics"]["acc"]["stderr"] is not None
    differences = found["variants"]["hybrid"]["harness"]["local_choice"]["differences"]
    assert set(differences["acc"]) == {"mean", "low", "high", "n"}
    assert found["variants"]["hybrid"]["full_attention_layers"] == list(KEPT)


def test_without_lm_eval_the_message_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    arguments = ("--harness", "anything", "--out", tmp_path / "report")
    assert run_cli("evaluate", DEMO, *arguments) == 2
    assert 'pip install "hybridize[lm-eval]"' in capsys.readouterr().err
