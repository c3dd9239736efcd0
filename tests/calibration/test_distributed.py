"""Several processes at one measurement: the same file as one gives, whoever dies on the way."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest

from converter.calibration.distributed import (
    ALONE,
    Processes,
    joined_processes,
    refuse_several_processes,
)
from converter.common.errors import UsageError
from tests.conftest import run_cli
from tests.held import records_of, start, wait_for_records, write_rows

SAMPLES = 40
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def command(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A calibration of more than a moment, without its --out."""
    path = write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", SAMPLES, length=400, seed=4)
    options = ("--data", path, "--samples", SAMPLES, "--window", 16, "--length", 500)
    options += ("--method", "nll-restore")
    return ["calibrate", *map(str, (sources["qwen3"], *options, "--device", "cpu"))]


@pytest.fixture(scope="module")
def alone(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bytes]:
    """The scores file of one process, given some options."""
    import torch

    torch.set_num_threads(1)

    def scores(*options: str) -> bytes:
        out = tmp_path_factory.mktemp("alone") / "scores.json"
        assert run_cli(*command, "--out", out, *options, "-q") == 0
        return out.read_bytes()

    return cache(scores)


@contextmanager
def several(
    arguments: list[str], logs: Path, module: Sequence[str] = ("converter",)
) -> Iterator[subprocess.Popen[str]]:
    """Two processes at a command, by torchrun; their words go to files by rank."""
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", 2, "--standalone")
    process = start(*launcher, "--redirects", 3, "--log-dir", logs, "-m", *module, *arguments)
    try:
        yield process
    finally:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
        process.communicate()


def words_of(logs: Path, rank: int) -> dict[str, str]:
    """What a rank said; how gloo connects is not our talk."""
    words = {}
    for stream in ("stdout", "stderr"):
        (path,) = logs.glob(f"*/attempt_0/{rank}/{stream}.log")
        lines = path.read_text().splitlines()
        words[stream] = "\n".join(line for line in lines if not line.startswith("[Gloo]"))
    return words


def test_two_processes_write_the_file_that_one_does(
    command: list[str], alone: Callable[..., bytes], tmp_path: Path
) -> None:
    out, work = tmp_path / "scores.json", tmp_path / "work"
    arguments = [*command, "--out", str(out), "--work", str(work), "--controls"]
    with several(arguments, tmp_path / "logs") as process:
        _, talk = process.communicate(timeout=240)
        assert process.returncode == 0, talk
    assert out.read_bytes() == alone("--controls")
    # Both did their part, and only the first speaks of it.
    names = {path.name: names_in(path) for path in work.glob("scores*.jsonl")}
    assert names.keys() == {"scores.jsonl", "scores.rank1.jsonl"}
    assert not set(names["scores.jsonl"]) & set(names["scores.rank1.jsonl"])
    assert abs(len(names["scores.jsonl"]) - len(names["scores.rank1.jsonl"])) <= 2
    leading, other = (words_of(tmp_path / "logs", rank) for rank in (0, 1))
    assert "layer-forwards" in leading["stdout"]
    assert f"scores: {out}" in leading["stderr"]
    assert other == {"stdout": "", "stderr": ""}


def names_in(log: Path) -> list[str]:
    return [record["name"] for record in records_of(log)]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_loses_nothing_that_was_found(
    victim: int, command: list[str], alone: Callable[..., bytes], tmp_path: Path
) -> None:
    out, work = tmp_path / "scores.json", tmp_path / "work"
    arguments = [*command, "--out", str(out), "--work", str(work), "--exact"]
    journals = [work / "scores.jsonl", work / "scores.rank1.jsonl"]
    held = ("tests.held", "3", "scores")
    with several(arguments, tmp_path / "logs", held) as process:
        wait_for_records(journals, 3, process)
        ranks = {
            child.environ().get("RANK"): child
            for child in psutil.Process(process.pid).children(recursive=True)
        }
        ranks[str(victim)].kill()
        process.communicate(timeout=120)
        assert process.returncode != 0
    assert not out.exists()
    found = [names_in(path) for path in journals]
    assert list(map(len, found)) == [3, 3]

    # One process goes on, and finds nothing again that either of them had found.
    assert run_cli(*command, "--exact", "--out", out, "--work", work, "-q") == 0
    resumed = names_in(journals[0])
    assert resumed[: len(found[0])] == found[0]
    assert not set(resumed) & set(found[1])
    assert len({name.split(" ")[1] for name in resumed + found[1]}) == SAMPLES
    # As one process that was never killed.
    assert out.read_bytes() == alone("--exact")


def test_ranks_end_with_their_launcher(command: list[str], tmp_path: Path) -> None:
    work = tmp_path / "work"
    arguments = [*command, "--out", str(tmp_path / "scores.json"), "--work", str(work), "--exact"]
    journals = [work / "scores.jsonl", work / "scores.rank1.jsonl"]
    with several(arguments, tmp_path / "logs", ("tests.held", "3", "scores")) as process:
        wait_for_records(journals, 3, process)
        ranks = psutil.Process(process.pid).children(recursive=True)
        assert len(ranks) == 2
        process.kill()
        assert not psutil.wait_procs(ranks, timeout=10)[1]


def test_convert_is_refused_in_several_processes(
    sources: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_cli("convert", sources["qwen3"], tmp_path / "out", "--layers", "1") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "only calibrate shares its work between processes" in err
    assert "hybridize convert --scores" in err
    assert list(tmp_path.iterdir()) == []


def test_one_process_is_alone_whoever_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for variables in ({}, {"WORLD_SIZE": "1", "RANK": "0"}, {"WORLD_SIZE": "4"}):
        for name in ("WORLD_SIZE", "RANK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with joined_processes() as processes:
            assert processes is ALONE
    monkeypatch.setenv("WORLD_SIZE", "1")
    refuse_several_processes("convert")
    items: Any = ["a", "b"]
    assert ALONE.leads
    assert not Processes(1, 2, 1).leads
    assert ALONE.share(items) == items
    assert ALONE.from_leader(items) is items
    assert ALONE.everyones(items) == [items]


@pytest.mark.parametrize(
    ("processes", "streaming", "got"),
    [(Processes(0, 2, 0), False, "torchrun"), (ALONE, True, "also --memory")],
)
def test_a_spread_model_is_one_processes_own(
    processes: Processes, streaming: bool, got: str
) -> None:
    from converter.calibration.run import placement_for

    with pytest.raises(UsageError, match="loaded whole, by one process") as caught:
        placement_for("spread", "auto", processes, streaming=streaming)
    assert caught.value.details["got"] == got
