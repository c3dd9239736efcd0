"""Weights that change under a command, at points where it opens or writes a file.

    python -m tests.source_faults

rewrites the second table of docs/faults.md. The model lies in the folder that is watched (see
`tests.faults`), so that points are also the openings of its files. A command is run for reference
on the weights as they were and on those that they become: what it leaves must be what one of these
leaves, never a mixture.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from converter.common.files import sha256_of
from tests.altering import (
    WEIGHTS,
    alter_between_samples,
    large_model,
    replace_weights,
    truncate_weights,
)
from tests.conftest import run_cli
from tests.fault_table import END, PAGE
from tests.faults import Fault, arm, in_fork, points_of, run_sweep
from tests.ggufs import make_bpe_tokenizer

BEGIN = "<!-- table: python -m tests.source_faults -->\n"
# The stage, the fault, the exit status (negative for a death by a signal) and what was left.
Outcome = tuple[str, str, int, str]

FAULTS: dict[str, Callable[[Path], None]] = {
    "source replaced": replace_weights,
    "source truncated": truncate_weights,
    "source altered between samples": alter_between_samples,
}
NOTHING, OLD, NEW = "nothing", "the old one", "the new one"
LINKED = "the new one, changed with its source"


@dataclass(frozen=True)
class Stage:
    """A command that reads weights.

    Attributes:
        command: its arguments; FOLDER is the place that is watched.
        reads: the folder in it whose weights change.
        result: what it writes there; None for a proof.
        often: out of how many points a full sweep takes one.
    """

    command: tuple[str, ...]
    reads: str = "model"
    result: str | None = "new"
    often: int = 5


_SHORT = ("--method", "nll-restore", "--samples", "2", "--length", "400", "--window", "16", "-q")
_CALIBRATE = ("calibrate", "FOLDER/model", "--out", "FOLDER/new", *_SHORT)
_CONVERT = ("convert", "FOLDER/model", "FOLDER/new", "-q")
_SCORES = ("--scores", "FOLDER/scores.json", "--budget", "2", "-q")
_LAYERS = ("--layers", "1,2", "--window", "16")
_TEXT = ("--text", "FOLDER/text.txt", "--text-tokens", "64", "--text-chunks", "3", "-q")
STAGES = {
    "calibrate": Stage(_CALIBRATE),
    "calibrate, resumed": Stage((*_CALIBRATE, "--work", "FOLDER/work")),
    "plan by scores": Stage(("plan", "FOLDER/model", "--out", "FOLDER/new", *_SCORES)),
    "convert by layers": Stage((*_CONVERT, *_LAYERS)),
    "convert --copy": Stage((*_CONVERT, *_LAYERS, "--copy")),
    "convert, measured": Stage((*_CONVERT, *_SHORT[:-1], "--holdout", "0", "--no-verify")),
    "retarget": Stage(("retarget", "FOLDER/out", "--budget", "1", "-q"), "out", "out"),
    "export": Stage(("export", "FOLDER/out", "FOLDER/new", "--type", "f16", "-q"), "out"),
    "evaluate": Stage(
        ("evaluate", "FOLDER/out", "--out", "FOLDER/new", "--tasks", "none", *_TEXT),
        *("out", "new", 20),
    ),
    "verify": Stage(("verify", "FOLDER/out", "-q"), "out", None, 40),
}

# Children would take long to load these.
_PRELOAD = (
    *("torch", "transformers.models.qwen3.modeling_qwen3", "gguf", "yaml"),
    *("converter.pipeline", "converter.evaluation.run", "converter.engines.gguf.export"),
)


def make_places(root: Path) -> Path:
    """A folder with a model, its scores, a log that lacks an example, and a checkpoint."""
    folder = root / "template"
    model = large_model(folder / "model")
    make_bpe_tokenizer(model)
    (folder / "text.txt").write_text("The farmer walked home. " * 40)
    scores, work = folder / "scores.json", folder / "work"
    assert run_cli("calibrate", model, "--out", scores, "--work", work, *_SHORT) == 0
    log = work / "scores.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:2]))
    decided = _filled(_SCORES, folder)
    assert run_cli("convert", model, folder / "out", *decided, "--copy") == 0
    return folder


def _filled(command: tuple[str, ...], folder: Path) -> list[str]:
    return [word.replace("FOLDER", str(folder)) for word in command]


def _written(place: Path) -> dict[str, str] | None:
    """What a command wrote, by name, but for weights and what tells times; None for nothing."""
    if not place.exists():
        return None
    if (report := place / "evaluation.json").is_file():
        return dict(json.loads(report.read_text())["provenance"]["weights"])
    files = [place] if place.is_file() else [f for f in place.rglob("*") if f.is_file()]
    return {path.name: sha256_of(path) for path in files if path.name != WEIGHTS}


def sweep(name: str, template: Path, folder: Path, *, sparser: int) -> list[Outcome]:
    """Every fault at points of a stage. For a process that has one thread."""
    stage = STAGES[name]
    command, reads = _filled(stage.command, folder), folder / stage.reads
    place = None if stage.result is None else folder / stage.result

    def restart() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, folder)

    def look() -> dict[str, str] | None:
        return None if place is None else _written(place)

    restart()
    known = [(OLD, look())]
    points = points_of(folder, command)
    known.append((NEW, look()))
    original, every = sha256_of(reads / WEIGHTS), stage.often * sparser
    outcomes = []
    for number, (title, change) in enumerate(FAULTS.items()):
        restart()
        change(reads)
        changed = sha256_of(reads / WEIGHTS)
        # The weights that it becomes may be as good.
        if in_fork(command, lambda: None) == 0:
            known.append((NEW, look()))
        first = number * every // len(FAULTS) % len(points)
        for index in range(first, len(points), every):
            restart()
            fault = Fault(title, lambda _: True, partial(change, reads))
            status = in_fork(command, lambda i=index, f=fault: arm(folder, i, f))
            found = look()
            left = next((told for told, one in known if one == found), f"BROKEN: {found}")
            left = NOTHING if found is None else left
            written = None if place is None or left != NEW else place / WEIGHTS
            if written and written.exists() and (digest := sha256_of(written)) != original:
                shared = written.samefile(reads / WEIGHTS) and change is not replace_weights
                left = LINKED if shared else NEW if digest == changed else f"BROKEN: {digest}"
            beside = {entry.name for entry in folder.iterdir()}
            beside -= {entry.name for entry in template.iterdir()} | {"new", "new.work"}
            outcomes.append((name, title, status, ", beside ".join([left, *sorted(beside)])))
    return outcomes


def hold(outcomes: list[Outcome]) -> None:
    """A refusal leaves nothing new, success something whole; nobody dies, and no proof is false."""
    for row in outcomes:
        name, _, status, left = row
        allowed: dict[int, tuple[str, ...]] = {2: (NOTHING, OLD), 0: (NEW, LINKED)}
        if STAGES[name].result is None:
            allowed = {1: (NOTHING,), 2: (NOTHING,)}
        if name == "retarget":
            # It reads the finished checkpoint once more, to show it.
            allowed[2] += (LINKED,)
        assert left in allowed.get(status, ()), row
        # What is read again, or was copied, is not shared.
        assert left != LINKED or name in ("convert by layers", "convert, measured", "retarget"), row


def run_sweeps(template: Path, work: Path, sparser: int, names: list[str]) -> list[Outcome]:
    """Sweeps over stages, in a process of their own, without threads."""
    return run_sweep("tests.source_faults", template, work, sparser, *names)


def write_table() -> None:
    """Sweep over everything and rewrite the table."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        render(run_sweeps(make_places(root), root / "work", 1, [*STAGES]))


def render(outcomes: list[Outcome]) -> None:
    """Write outcomes into the page, equal ones counted."""
    hold(outcomes)
    lines = ["| stage | fault | points | exit | left |", "|---|---|---|---|---|"]
    for (name, title, status, left), points in sorted(Counter(outcomes).items()):
        lines.append(f"| {name} | {title} | {points} | {status} | {left} |")
    text = PAGE.read_text(encoding="utf-8")
    begin, end = text.index(BEGIN) + len(BEGIN), text.rindex(END)
    PAGE.write_text(text[:begin] + "\n".join(lines) + "\n" + text[end:], encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:]:
        for module in _PRELOAD:
            __import__(module)
        _template, _work, _sparser, *_names = sys.argv[1:]
        _sweep = partial(sweep, template=Path(_template), folder=Path(_work), sparser=int(_sparser))
        print(json.dumps([row for name in _names for row in _sweep(name)]))  # noqa: T201
    else:
        write_table()
