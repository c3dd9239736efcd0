"""lm-eval runs our loaded model, offline, on a task made here."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import make_tokenizer, run_cli
from tests.hybrids import KEPT, PLAN, rule

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None or importlib.util.find_spec("accelerate") is None,
    reason="lm-eval is not installed (pip install hybridize[lm-eval])",
)
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
ROWS = [
    {"question": f"{letter * 70} is", "choices": ["one", "two", "six"], "answer": i % 3}
    for i, letter in enumerate("abcdefghijkl")
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(TASK.format(rows=rows))
    return tmp_path


@needs_harness
@pytest.mark.filterwarnings("default")
def test_the_harness_scores_the_plan(
    folder: Path,
    checkpoint: Callable[..., Path],
    eager: Callable[[str], Any],
    tmp_path: Path,
    capsys: Capture,
) -> None:
    """Its accuracy is that of log-likelihoods by the brute-force mask."""
    out = tmp_path / "report"
    arguments = ("--tasks", "none", "--speed-runs", 0, "--dtype", "float64", "--out", out)
    harness = ("--harness", "local_choice", "--harness-tasks", folder / "tasks")
    limited = (*arguments, *harness, "--harness-limit", 9)
    assert run_cli("evaluate", checkpoint("qwen3", "plain"), *limited) == 0
    assert "lm-eval local_choice" in capsys.readouterr().out
    found = json.loads((out / "evaluation.json").read_text())
    make_tokenizer(tmp_path)
    full = ["full_attention"] * len(PLAN)
    for name, kinds in {"original": full, "hybrid": PLAN}.items():
        right = sum(
            likeliest(eager("qwen3"), row, kinds, tmp_path) == row["answer"] for row in ROWS[:9]
        )
        value = found["variants"][name]["harness"]["local_choice"]
        assert value["n"] == 9
        assert value["metrics"]["acc"]["value"] == pytest.approx(right / 9)
        assert value["metrics"]["acc"]["stderr"] is not None
    differences = found["variants"]["hybrid"]["harness"]["local_choice"]["differences"]
    assert set(differences["acc"]) == {"mean", "low", "high", "n"}
    assert found["variants"]["hybrid"]["full_attention_layers"] == list(KEPT)


def likeliest(reference: Any, row: dict[str, Any], kinds: list[str], folder: Path) -> int:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.encode(row["question"])
    sums = []
    for choice in row["choices"]:
        answer = tokenizer.encode(f" {choice}")
        logits = reference.logits([*prompt, *answer][:-1], kinds, **rule("plain", len(prompt)))
        rows = logits.log_softmax(1)[len(prompt) - 1 :]
        sums.append(float(rows.gather(1, torch.tensor(answer)[:, None]).sum()))
    return sums.index(max(sums))


@needs_harness
@pytest.mark.filterwarnings("default")
def test_a_task_that_lm_eval_lacks_is_told(
    folder: Path, checkpoint: Callable[..., Path], tmp_path: Path, capsys: Capture
) -> None:
    arguments = ("--tasks", "none", "--speed-runs", 0, "--out", tmp_path / "report")
    harness = ("--harness", "no_such_task", "--harness-tasks", folder / "tasks")
    assert run_cli("evaluate", checkpoint("qwen3", "plain"), *arguments, *harness) == 2
    assert "lm-eval has no such task" in capsys.readouterr().err


def test_without_lm_eval_the_message_says_how_to_get_it(
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name == "lm_eval" else found(name, *rest),
    )
    arguments = ("--harness", "anything", "--out", tmp_path / "report")
    assert run_cli("evaluate", checkpoint("qwen3", "plain"), *arguments) == 2
    assert 'pip install "hybridize[lm-eval]"' in capsys.readouterr().err
