"""Scores, logs and proofs hold for the weights that were measured, and for no others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from converter.calibration.cache import ResultLog
from converter.common.errors import SourceError
from converter.engines.gguf.writer import stored_rows
from converter.inference import memory
from converter.inference.memory import DEVICE, MemoryPlan
from tests.altering import alter_between_samples, large_model, replace_weights, truncate_weights
from tests.conftest import run_cli

MEASURE = ("--method", "nll-restore", "--samples", 2, "--length", 400, "--window", 16, "-q")
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its scores with the log they came from, and a checkpoint decided by them."""
    root = tmp_path_factory.mktemp("measured")
    model, scores = large_model(root / "model"), root / "scores.json"
    assert run_cli("calibrate", model, "--out", scores, "--work", root / "work", *MEASURE) == 0
    out = ("--scores", scores, "--budget", 2, "--copy", "-q")
    assert run_cli("convert", model, root / "out", *out) == 0
    return root


@pytest.fixture
def root(measured: Path, tmp_path: Path) -> Path:
    """A copy of it all, in which the model may be changed."""
    return Path(shutil.copytree(measured, tmp_path / "measured"))


STAGES: dict[str, tuple[tuple[object, ...], str, str]] = {
    "plan": (("plan", "model", "--scores", "scores.json", "--budget", 2), "model", "another model"),
    "plan by loss": (
        ("plan", "model", "--scores", "scores.json", "--budget", "nll:0.1"),
        *("model", "another model"),
    ),
    "convert": (
        ("convert", "model", "new", "--scores", "scores.json", "--budget", 2),
        *("model", "another model"),
    ),
    "resume": (
        ("calibrate", "model", "--out", "new.json", "--work", "work", *MEASURE),
        *("model", "the weights have other bytes"),
    ),
    "retarget": (("retarget", "out", "--budget", 1), "out", "another model"),
    "evaluate": (
        ("evaluate", "out", "--tasks", "recall", "--samples", 1, "--out", "new"),
        *("out", "another model"),
    ),
    "evaluate against": (
        ("evaluate", "out", "--against", "model", "--out", "new"),
        *("model", "not made from this model"),
    ),
}


@pytest.mark.parametrize("stage", STAGES)
def test_what_was_measured_on_other_bytes_is_refused(
    stage: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """Where no sampled hash can see it, and the file has the old time."""
    command, altered, problem = STAGES[stage]
    monkeypatch.chdir(root)
    before = sorted(path.name for path in root.iterdir())
    alter_between_samples(root / altered, forge=True)
    assert run_cli(*command) == 2
    error = capsys.readouterr().err
    assert problem in error and "Traceback" not in error
    assert sorted(path.name for path in root.iterdir()) == before


def test_the_same_bytes_elsewhere_are_the_same_weights(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    shutil.copytree("model", "again")
    assert run_cli("plan", "again", "--scores", "scores.json", "--budget", 2, "-q") == 0
    command = ("calibrate", "again", "--out", "new.json", "--work", "work", *MEASURE)
    assert run_cli(*command) == 0
    assert Path("new.json").read_bytes() == Path("scores.json").read_bytes()


CHANGES = {
    "replaced": replace_weights,
    "altered between samples": alter_between_samples,
    # What is mapped would end the process here.
    "truncated": truncate_weights,
}


@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
def test_weights_that_change_while_they_are_measured_end_it(
    case: str,
    streamed: bool,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    """Nothing found afterwards is kept, and no checkpoint gets its name."""
    monkeypatch.chdir(root)
    memory_plan = MemoryPlan(streamed, 1, DEVICE, None, 4096, "chosen")
    monkeypatch.setattr(memory, "plan_memory", lambda *_: memory_plan)
    append, kept = ResultLog.append, list[dict[str, Any]]()

    def strike(self: ResultLog, record: dict[str, Any]) -> None:
        append(self, record)
        kept.append(record)
        if len(kept) == 2:
            CHANGES[case](root / "model")

    monkeypatch.setattr(ResultLog, "append", strike)
    command = ("convert", "model", "new", "--budget", 2, "--memory", "1GB", *MEASURE)
    assert run_cli(*command) == 2
    error = capsys.readouterr().err
    assert "a file of the model changed while it was in use" in error
    # The log's head, and the one example that was found before.
    assert len(kept) == 2
    assert not {path.name for path in root.iterdir()} & {"new", ".new.partial"}
    assert "new.work" in {path.name for path in root.iterdir()}


def verified(capsys: Captured, *arguments: object) -> tuple[int, dict[str, dict[str, Any]], Any]:
    capsys.readouterr()
    status = run_cli("verify", *arguments, "--json", "-q")
    report = json.loads(capsys.readouterr().out)
    return status, {check["name"]: check for check in report["checks"]}, report["sampled"]


def test_verify_reads_the_weights_whole(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(root)
    status, checks, sampled = verified(capsys, "out", "--against", "model")
    assert status == 0 and not sampled
    assert checks["hashes of the weights"]["value"] == "1 hashed wholly"
    assert checks["weights are those that were measured"]["value"] == "identical"
    assert checks["weights are the source's"]["value"] == "identical"

    alter_between_samples(root / "out", forge=True)
    status, checks, _ = verified(capsys, "out", "--against", "model")
    assert status == 1 and checks["sizes and hashes"]["ok"]
    names = {"hashes of the weights", "weights are those that were measured"}
    for name in (*names, "weights are the source's"):
        assert (checks[name]["ok"], checks[name]["value"]) == (False, "model.safetensors")


def test_verify_says_of_what_it_could_compare_samples_only(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """Without a measurement nobody has read the weights; linked, they are the source's own."""
    monkeypatch.chdir(root)
    command = ("convert", "model", "new", "--layers", "1,2", "--window", 16, "-q")
    assert run_cli(*command) == 0
    status, checks, sampled = verified(capsys, "new", "--against", "model")
    assert status == 0 and sampled == ["model.safetensors"]
    told = "1 hashed wholly, 1 held against sampled hashes only"
    assert checks["hashes of the weights"]["value"] == told
    assert checks["weights are the source's"]["value"] == "1 the same file (hard link)"
    assert "weights are those that were measured" not in checks

    assert run_cli(*command, "--force", "--copy") == 0
    assert not (root / "new" / "model.safetensors").samefile(root / "model" / "model.safetensors")
    status, checks, sampled = verified(capsys, "new", "--against", "model")
    assert status == 0 and sampled == []
    assert checks["weights are the source's"]["value"] == "identical"


def test_verify_notices_a_change_while_it_runs(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    from converter.checkpoint.verify import checks

    ask: Callable[..., Any] = checks.ask

    def altered(*arguments: Any, **options: Any) -> Any:
        answer = ask(*arguments, **options)
        alter_between_samples(root / "out")
        return answer

    monkeypatch.setattr(checks, "ask", altered)
    assert run_cli("verify", root / "out") == 2
    assert "a file of the model changed" in capsys.readouterr().err


def test_a_file_that_ends_early_is_refused_while_it_is_exported(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(bytes(8 + 4 * 6 - 1))
    with pytest.raises(SourceError, match="changed while it was in use"):
        list(stored_rows(path, 8, (4, 3), 6, 1))
