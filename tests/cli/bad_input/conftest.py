"""How a command that must be refused is run, and good files to be damaged."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from string import Template
from typing import Any

import pytest

from converter.calibration.scores import ExampleScores, Scores
from converter.common.files import write_json
from converter.model.mask import Mask
from converter.model.source import open_source
from tests.conftest import run_cli

# What click says may come after a line on how the command is used.
BY_CLICK = ("Usage: ", "Error: ")
LONG = "word " * 40


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything in a folder, hidden or not, with what changes when it is written to."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(folder))] = (status.st_size, status.st_mtime_ns)
    return found


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    value = json.loads(path.read_text()) | changes
    removed = {key for key, part in changes.items() if part is None}
    path.write_text(json.dumps({key: value[key] for key in value if key not in removed}))


@dataclass(frozen=True)
class Refused:
    """Runs commands that must be refused: with one message, no result, and the disk as it was.

    Attributes:
        places: what stands for a place in commands and messages. `$SOURCE` is a good Qwen3 model,
            `$HERE` the folder of the test.
        capsys: what was printed.
    """

    places: dict[str, Path]
    capsys: pytest.CaptureFixture[str]

    def __call__(
        self,
        command: str,
        *says: object,
        begins: str | tuple[str, ...] = "error: ",
        **places: Path,
    ) -> None:
        """Run a command and find everything that it `says` in its message."""

        def filled(text: object) -> str:
            return Template(str(text)).safe_substitute(self.places, **places)

        before = tree(self.places["HERE"])
        self.capsys.readouterr()
        status = run_cli(*map(filled, shlex.split(command)))
        out, err = self.capsys.readouterr()
        assert (status, out) == (2, ""), err
        assert err.startswith(begins)
        assert "Traceback" not in err
        assert sum(line.startswith(("error:", "Error:")) for line in err.splitlines()) == 1
        for words in says:
            assert filled(words) in err
        assert tree(self.places["HERE"]) == before


@pytest.fixture
def refused(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Refused:
    return Refused({"SOURCE": sources["qwen3"], "HERE": tmp_path}, capsys)


@pytest.fixture
def plan_file(sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A good plan for the Qwen3 model."""
    path = tmp_path / "plan.json"
    options = ("--layers", "0,2", "--window", "16", "--out", path)
    assert run_cli("plan", sources["qwen3"], *options) == 0
    capsys.readouterr()
    return path


@pytest.fixture
def scores_file(sources: dict[str, Path], tmp_path: Path) -> Path:
    """Scores of the Qwen3 model under a window of 16, as a calibration would write them."""
    example = ExampleScores("pair", 100, 4, 1.0, 3.0, (0.5, 1.5, 1.0, 0.1))
    scores = Scores(
        method="nll-restore",
        mask=Mask(16),
        examples=(example, replace(example, sliding=3.5)),
        layer_forwards=48,
        fingerprint={"source": open_source(str(sources["qwen3"])).fingerprint},
        order=(1, 2, 0, 3),
    )
    path = tmp_path / "scores.json"
    write_json(path, scores.to_json())
    return path


@pytest.fixture
def hybrid(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A private copy of a checkpoint of the Qwen3 model, without scores, in `$HERE/out`."""
    return Path(shutil.copytree(checkpoint("qwen3", "plain"), tmp_path / "out"))
