"""Killed measurements lose at most the example they were at, and never mix with other work."""

from __future__ import annotations

import json
import math
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import run_cli
from tests.held import records_of, start, wait_for_records, write_rows

SAMPLES, HELD_OUT, WINDOW = 40, 30, 16


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def source(sources: dict[str, Path]) -> Path:
    return sources["qwen3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """Options for examples long enough to be killed among."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    write_rows(path, SAMPLES + HELD_OUT, length=480, seed=2)
    # Exact, so that every run has as many examples to be killed among; test_race.py resumes races,
    # and test_calibration.py contests.
    return (
        *("--data", path, "--samples", SAMPLES, "--window", WINDOW, "--length", 500),
        *("--method", "nll-restore", "--exact", "--device", "cpu"),
    )


@pytest.fixture(scope="module")
def undisturbed(
    source: Path, data: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory
) -> bytes:
    import torch

    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("undisturbed") / "scores.json"
    assert run_cli("calibrate", source, "--out", out, *data, "-q") == 0
    return out.read_bytes()


@contextmanager
def started(count: int, title: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A command line in a process of its own, which waits once it has found so many results."""
    process = start("-m", "tests.held", count, title, *arguments)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def examples_in(records: list[dict[str, Any]]) -> list[str]:
    """Which examples the records are of; they are all of the same sets of layers."""
    assert len({record["name"].split(" ", 2)[2] for record in records}) == 1
    return [record["name"].split(" ")[1] for record in records]


@pytest.mark.parametrize("count", [1, 12])
def test_a_killed_calibration_resumes_to_the_same_bits(
    count: int,
    source: Path,
    data: tuple[object, ...],
    undisturbed: bytes,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "scores.json"
    command = ("calibrate", source, "--out", out, *data)
    log = tmp_path / "scores.json.work" / "scores.jsonl"
    with started(count, "scores", *command) as process:
        wait_for_records([log], count, process)
        assert run_cli(*command) == 2
        assert "another process is doing this work" in capsys.readouterr().err
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not out.exists()
    found = records_of(log)
    assert len(found) == count
    with log.open("a") as file:
        file.write('{"name": "scores 30 ans')

    capsys.readouterr()
    assert run_cli(*command, "-q", "--json", "--work", log.parent) == 0
    assert out.read_bytes() == undisturbed
    # What was finished was not done again: even its time is the first process's.
    resumed = records_of(log)
    assert resumed[: len(found)] == found
    assert len(set(examples_in(resumed))) == len(resumed) == SAMPLES
    printed = json.loads(capsys.readouterr().out)
    assert printed["seconds"] == math.fsum(record["seconds"] for record in resumed)


def test_an_interrupted_calibration_says_so_and_resumes(
    source: Path, data: tuple[object, ...], undisturbed: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "scores.json"
    command = ("calibrate", source, "--out", out, *data)
    log = tmp_path / "scores.json.work" / "scores.jsonl"
    with started(3, "scores", *command) as process:
        wait_for_records([log], 3, process)
        process.send_signal(signal.SIGINT)
        _, talk = process.communicate(timeout=60)
        assert process.returncode == 130
    assert "interrupted: run the same command again to resume" in talk
    assert "Traceback" not in talk
    found = records_of(log)
    assert len(found) == 3
    assert not out.exists()
    assert run_cli(*command, "-q") == 0
    assert out.read_bytes() == undisturbed
    for record, example in zip(found, json.loads(undisturbed)["per_example"], strict=False):
        sliding, *restored = record["nll"]
        assert example["sliding"] == sliding
        assert example["scores"] == [sliding - nll for nll in restored]
    # Without --work, what was kept for a resumption goes with it.
    assert not log.parent.exists()


@pytest.mark.parametrize("stage", ["scores", "quality"])
def test_a_killed_conversion_leaves_nothing_and_resumes(
    stage: str,
    source: Path,
    data: tuple[object, ...],
    undisturbed: bytes,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    command = ("convert", source, out, *data, "--holdout", HELD_OUT, "--no-verify")
    log = tmp_path / "out.work" / f"{stage}.jsonl"
    with started(2, stage, *command) as process:
        wait_for_records([log], 2, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert {path.name for path in tmp_path.iterdir()} == {"out.work"}
    found = records_of(log)
    assert run_cli(*command, "-q") == 0
    assert (out / "hybrid" / "scores.json").read_bytes() == undisturbed
    quality = json.loads((out / "hybrid" / "quality.json").read_text())
    assert quality["examples"] == HELD_OUT
    if stage == "quality":
        for i, record in enumerate(found):
            # The winner may be a periodic plan, which is run once and stands in two rows.
            plans = {
                tuple(outcome["full_attention_layers"]): outcome["per_example"]["nll"][i]
                for outcome in quality["outcomes"]
            }
            # A record is of as many plans as fit the memory planned for; the curve's follow.
            assert record["nll"][: len(plans)] == list(plans.values())[: len(record["nll"])]
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.fixture
def log(source: Path, data: tuple[object, ...], tmp_path: Path) -> Path:
    """A log in a work folder that was kept."""
    out, work = tmp_path / "scores.json", tmp_path / "work"
    assert run_cli("calibrate", source, "--out", out, *data, "--work", work, "-q") == 0
    return work / "scores.jsonl"


def test_other_settings_are_refused_by_name_and_fresh_starts_over(
    log: Path,
    source: Path,
    data: tuple[object, ...],
    sources: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = log.read_bytes()
    out = tmp_path / "again.json"
    base = ("--out", out, *data, "--work", log.parent)
    changes: dict[str, tuple[Path, tuple[object, ...]]] = {
        "sinks was 0, now 1": (source, ("--sinks", 1)),
        "dtype was float32, now bfloat16": (source, ("--dtype", "bfloat16")),
        "seed was 0, now 1": (source, ("--seed", 1)),
        "length was 500, now 499; seed was 0, now 1": (source, ("--length", 499, "--seed", 1)),
        "the model is another one; the weights have other bytes": (sources["qwen2"], ()),
    }
    for said, (model, options) in changes.items():
        assert run_cli("calibrate", model, *base, *options) == 2
        error = capsys.readouterr().err
        assert f"earlier results belong to other work: {said}\n" in error
        assert "--fresh" in error
        assert not out.exists()
        assert log.read_bytes() == before
    # Nor is a log with a line cut short among others.
    log.write_bytes(before.replace(b"}\n", b"\n", 3))
    assert run_cli("calibrate", source, *base) == 2
    error = capsys.readouterr().err
    assert "the file of earlier results is damaged" in error
    assert "--fresh" in error
    assert not out.exists()
    fewer = ("--samples", 2, "--dtype", "bfloat16", "--fresh", "-q")
    assert run_cli("calibrate", source, *base, *fewer) == 0
    scores = json.loads(out.read_text())
    assert scores["examples"] == 2
    assert scores["fingerprint"]["dtype"] == "bfloat16"
    assert len(records_of(log)) == 2


@pytest.mark.parametrize("generated", [False, True], ids=["rows", "generated"])
def test_more_samples_go_on_from_fewer(
    generated: bool, source: Path, data: tuple[object, ...], tmp_path: Path
) -> None:
    """Also where the examples that were held out are now among the scored ones."""
    if generated:
        data = ("--window", WINDOW, "--length", 450, "--method", "nll-restore", "--exact")
    base, work = ("calibrate", source, *data, "-q"), tmp_path / "work"
    few, many, anew = (tmp_path / f"{name}.json" for name in ("few", "many", "anew"))
    assert run_cli(*base, "--samples", 20, "--out", few, "--work", work) == 0
    found = records_of(work / "scores.jsonl")
    assert run_cli(*base, "--samples", 36, "--out", many, "--work", work) == 0
    assert records_of(work / "scores.jsonl")[:20] == found
    assert len(records_of(work / "scores.jsonl")) == 36
    assert run_cli(*base, "--samples", 36, "--out", anew) == 0
    assert many.read_bytes() == anew.read_bytes()
    fewer, more = (json.loads(path.read_text())["per_example"] for path in (few, many))
    assert more[:20] == fewer
