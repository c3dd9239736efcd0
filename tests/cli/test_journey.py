"""From a model to a decision and a checkpoint, as a new user sees it: one command, one screen."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import DEMO, run_cli
from tests.terminal import COLUMNS, environment_of, run_in_terminal, screen

SCREEN = 40


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A first look with everything else as it is by default, in a terminal: folder and screen."""
    folder = tmp_path_factory.mktemp("journey")
    (folder / "model").symlink_to(DEMO)
    options = ("--window", 16, "--quick")
    status, written = run_in_terminal(folder, "convert", "model", "hybrid", *options)
    assert status == 0, written
    return folder / "hybrid", screen(written)


def test_a_default_conversion_fits_a_screen(converted: tuple[Path, list[str]]) -> None:
    _, lines = converted
    assert len(lines) <= SCREEN, "\n".join(lines)
    assert max(map(len, lines)) <= COLUMNS


def test_time_is_told_stage_by_stage(converted: tuple[Path, list[str]]) -> None:
    _, lines = converted
    told = [match for line in lines if (match := re.match(r"stage (\d) of (\d), [\w-]+: ", line))]
    assert [int(match[1]) for match in told] == list(range(1, len(told) + 1))
    assert {int(match[2]) for match in told} == {len(told)}
    assert any("quick: a first look" in line for line in lines)


def test_it_ends_with_a_choice_its_reason_and_what_to_do_next(
    converted: tuple[Path, list[str]],
) -> None:
    out, lines = converted
    page = " ".join("".join(line.ljust(COLUMNS) for line in lines).split())
    kept = json.loads((out / "hybrid" / "plan.json").read_text())["full_attention_layers"]
    curve = json.loads((out / "hybrid" / "curve.json").read_text())
    # Every number of layers there is, the plan's and the recommended one marked.
    rows = [line.split() for line in lines if re.match(r" +\d+ +\d+%", line)]
    marked = [int(row[0]) for row in rows if "chosen" in row]
    assert marked == [len(kept)]
    assert {0, 8, len(kept)} <= {int(row[0]) for row in rows}
    by_count = {p["full_layers"]: p for p in curve["points"] if p["name"].find("offset") < 0}
    for row in rows[:-1]:
        assert row[2] == f"{by_count[int(row[0])]['nll_above_original']['mean']:.3f}"
    assert curve["recommended"]["reason"][:40] in page
    assert "it computes its plan (32 checks)" in page
    assert (out / "hybrid" / "curve.png").is_file() and "curve.png" in page
    for name in ("run", "evaluate", "export"):
        assert f"hybridize {name} " in page
    # The 32 lines of the proof are for who asks.
    assert "keys, loaded untrusted" not in page


def test_a_pipe_gets_the_verdict_without_codes_in_any_language(
    converted: tuple[Path, list[str]], tmp_path: Path
) -> None:
    scores = converted[0] / "hybrid" / "scores.json"
    command = ("convert", DEMO, tmp_path / "again", "--scores", scores, "--verify", "-v")
    for changes in ({"NO_COLOR": "1"}, {"LANG": "C", "LC_ALL": "C"}):
        done = subprocess.run(
            [sys.executable, "-m", "converter", *map(str, command), "--force"],
            capture_output=True,
            env=environment_of(changes),
            check=True,
        )
        text = done.stdout.decode()
        assert "\x1b" not in text + done.stderr.decode()
        assert "it computes its plan (32 checks)" in text
        assert "keys, loaded untrusted" in text
        assert "next:" in done.stderr.decode()


def test_the_next_command_keeps_the_curve_and_shows_what_the_new_plan_costs(
    converted: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(converted[0], tmp_path / "hybrid")
    curve = (out / "hybrid" / "curve.json").read_bytes()
    point = next(p for p in json.loads(curve)["points"] if p["full_layers"] == 5)
    assert run_cli("retarget", out, "--budget", 5) == 0
    shown = capsys.readouterr().out
    rows = (line.replace(",", " ").split() for line in shown.splitlines())
    row = next(words for words in rows if "chosen" in words[5:])
    assert row[0] == "5" and row[2] == f"{point['nll_above_original']['mean']:.3f}"
    assert (out / "hybrid" / "curve.json").read_bytes() == curve
    card = (out / "README.md").read_text()
    assert "hybrid/curve.png" in card and "Not measured for this plan" not in card
    # No plan of the curve.
    assert run_cli("retarget", out, "--layers", "0,1,4,6") == 0
    assert "chosen by" in capsys.readouterr().out
    assert not list(out.glob("hybrid/curve.*"))
    assert "Not measured for this plan" in (out / "README.md").read_text()


def test_no_color_is_obeyed_in_a_terminal(converted: tuple[Path, list[str]]) -> None:
    curve = converted[0] / "hybrid" / "curve.json"
    status, written = run_in_terminal(
        curve.parent, "plan", DEMO, "--curve", "curve.json", NO_COLOR="1"
    )
    assert status == 0
    assert not re.search(r"\x1b\[[\d;]*3\d", written)
