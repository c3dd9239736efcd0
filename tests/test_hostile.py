"""Every hostile input is refused with one message, runs nothing, and is in docs/trust.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import make_model
from tests.hostile import BEGIN, END, PAGE, outcome, row
from tests.hostile_cases import CASES, RAN, Case

# What another library says about a file may change with its version; what we say may not.
GOT = "; got:"


@pytest.fixture(scope="module")
def hostile_sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hostile")
    return {
        name: make_model(root / name, name, shards=name == "qwen2")
        for name in {case.family for case in CASES}
    }


def documented() -> dict[str, str]:
    text = PAGE.read_text(encoding="utf-8")
    rows = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].splitlines()[2:]
    return {line.split(" | ")[0].removeprefix("| "): line for line in rows}


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_a_hostile_input_is_refused(
    case: Case, hostile_sources: dict[str, Path], tmp_path: Path
) -> None:
    status, said, place = outcome(case, hostile_sources[case.family], tmp_path / "case")
    assert status == case.status, said
    assert "Traceback" not in said
    left = {path.name for path in tmp_path.rglob("*")}
    assert RAN not in left, "code from the input ran"
    beside = {path.name for path in place.beside.rglob("*")}
    assert not {name for name in beside if "_own" in name}, "code from the input was carried along"
    assert (place.beside / "out").exists() <= (status == 0 or "checkpoint" in case.title)
    there = documented()[case.title]
    assert there.split(GOT)[0].removesuffix(" |") == row(case, status, said).split(GOT)[
        0
    ].removesuffix(" |"), "run: python -m tests.hostile"


def test_the_table_has_no_other_rows() -> None:
    assert list(documented()) == [case.title for case in CASES]
