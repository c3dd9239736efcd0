"""`hybridize calibrate`: its methods, its ways of measuring less, and what it says of them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from converter.calibration.calibrate import calibrate as run_calibration
from converter.calibration.scores_file import load_scores
from converter.calibration.selectors import MEASURING
from tests.conftest import LAYERS, run_cli
from tests.runners import MASKS, Counter, example_of, run, scoring

SAMPLES = 18
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = [
        {"prompt": f"{'some words '}{'and more ' * (8 + row % 5)}end.", "answer": f"yes {row}"}
        for row in range(SAMPLES)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def calibrate(source: Path, rows: Path, out: Path, *options: object) -> dict[str, Any]:
    data = ("--method", "nll-restore", "--data", rows, "--samples", SAMPLES)
    placed = ("--window", 12, "--device", "cpu")
    assert run_cli("calibrate", source, "--out", out, *data, *placed, *options) == 0
    scores: dict[str, Any] = json.loads(out.read_text())
    return scores


def scored_layers(scores: dict[str, Any]) -> list[int]:
    return [layer["examples"] for layer in scores["layers"]]


def test_a_path_integral_prints_its_sum_beside_the_gap(
    sources: dict[str, Path], rows: Path, tmp_path: Path, capsys: Captured
) -> None:
    options = ("--method", "path-integral", "--samples", 6)
    scores = calibrate(sources["llama"], rows, tmp_path / "s.json", *options)
    total = sum(layer["score"] for layer in scores["layers"])
    gap = scores["nll"]["sliding"]["mean"] - scores["nll"]["full"]["mean"]
    said = f"the scores sum to {total:.3f}; all sliding is {gap:.3f} above all full"
    assert said in capsys.readouterr().out
    assert total == pytest.approx(gap, abs=0.1)


@pytest.fixture(scope="module")
def raced(
    sources: dict[str, Path], rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """The scores file of a race, and what was printed."""
    path, printed = tmp_path_factory.mktemp("raced") / "scores.json", io.StringIO()
    with redirect_stdout(printed):
        calibrate(sources["qwen3"], rows, path)
    return path, printed.getvalue()


def test_a_race_is_the_default_and_says_what_it_left_open(
    raced: tuple[Path, str], sources: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    path, printed = raced
    race = json.loads(path.read_text())["race"]
    assert race["keep"] == 1
    assert race["rounds"][0] == [16, LAYERS]
    assert "raced for 1 layers" in printed
    assert "among 1 of resampled" in printed
    assert "resampled examples choose the same 1 layers" in printed
    more = calibrate(sources["qwen3"], rows, tmp_path / "two.json", "--budget", 2)
    assert more["race"]["keep"] == 2


def test_exact_scores_every_layer_on_every_example(
    raced: tuple[Path, str],
    sources: dict[str, Path],
    rows: Path,
    tmp_path: Path,
    capsys: Captured,
) -> None:
    exact = calibrate(sources["qwen3"], rows, tmp_path / "exact.json", "--exact")
    assert exact["race"] is None
    assert scored_layers(exact) == [SAMPLES] * LAYERS
    assert "raced" not in capsys.readouterr().out
    records = json.loads(raced[0].read_text())["per_example"]
    for left, right in zip(records, exact["per_example"], strict=False):
        for mine, whole in zip(left["scores"], right["scores"], strict=True):
            assert mine is None or mine == pytest.approx(whole, abs=1e-5)


def test_equal_runs_write_equal_files(
    raced: tuple[Path, str], sources: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    calibrate(sources["qwen3"], rows, tmp_path / "again.json", "-q")
    assert (tmp_path / "again.json").read_bytes() == raced[0].read_bytes()


def test_a_spread_model_scores_as_a_whole_one(
    sources: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    """By accelerate's device_map, which puts everything on the CPU here."""
    whole = calibrate(sources["qwen2"], rows, tmp_path / "whole.json", "--exact", "-q")
    out = tmp_path / "spread.json"
    spread = calibrate(sources["qwen2"], rows, out, "--exact", "-q", "--device", "spread")
    assert spread["fingerprint"]["dtype"] == "float32"
    means = [[layer["score"] for layer in scores["layers"]] for scores in (spread, whole)]
    assert means[0] == pytest.approx(means[1], abs=1e-5)


@pytest.mark.parametrize("method", ["kl", "path-integral", "nll-restore"])
def test_a_conversion_by_any_method_carries_its_scores(
    method: str, sources: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    data = ("--data", rows, "--samples", 4, "--holdout", 2, "--window", 12, "--device", "cpu")
    options = ("--method", method, "--budget", 2, "--no-verify", "-q")
    assert run_cli("convert", sources["qwen3"], out, *data, *options) == 0
    scores = load_scores(out / "hybrid" / "scores.json")
    plan = json.loads((out / "hybrid" / "plan.json").read_text())
    assert plan["method"] == scores.method == method
    assert set(plan["full_attention_layers"]) == set(scores.order[:2])


# What these run depends on what they find.
GUESSED = ("search", "guided", "gates")


@dataclass
class Watched(Counter):
    """A progress bar that keeps every total it was told."""

    foretold: list[float] = field(default_factory=list)

    def expect(self, amount: float) -> None:
        """So much is still to do."""
        super().expect(amount)
        self.foretold.append(self.expected)


@pytest.mark.parametrize("method", MEASURING)
@pytest.mark.parametrize("race", [False, True])
def test_progress_ends_where_it_said_it_would(
    method: str, race: bool, sources: dict[str, Path], tmp_path: Path
) -> None:
    """What the last job is to take is what it takes, and the scores file says the same."""
    bars: list[Watched] = []

    @contextmanager
    def progress(_title: str, layer_forwards: float) -> Iterator[Watched]:
        bars.append(Watched(expected=layer_forwards))
        yield bars[-1]

    examples = [example_of(30 + i, 2) for i in range(5)]
    measured = run(sources["qwen3"], examples, MASKS["plain"], tmp_path / "work")
    scores = run_calibration(measured, scoring(method, race=race), progress).scores
    assert [bar.done for bar in bars] == pytest.approx([bar.expected for bar in bars])
    if method not in GUESSED and not race:
        # Nothing here depends on what is found, so it is known from the start.
        for bar in bars:
            assert bar.foretold == pytest.approx([bar.done] * len(bar.foretold))
    assert scores.layer_forwards == pytest.approx(sum(bar.done for bar in bars))
    # Everything is known now: nothing is expected, and nothing done.
    again = replace(measured, examples=measured.examples)
    bars.clear()
    assert run_calibration(again, scoring(method, race=race), progress).scores == scores
    assert [(bar.done, bar.expected) for bar in bars] == [(0, 0)] * len(bars)
