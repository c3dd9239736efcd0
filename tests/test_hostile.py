"""Every hostile input is refused with one message, runs nothing, and is in docs/trust.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hostile import BEGIN, CASES, END, PAGE, make_sources, outcome, row
from tests.hostile_cases import RAN, Case


@pytest.fixture(scope="module")
def hostile_sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_sources(tmp_path_factory.mktemp("hostile"))


def ours(line: str) -> str:
    """What we say; what another library says about a file may change with its version."""
    return line.split("; got:")[0].removesuffix(" |")


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
    found = ours(row(case, status, said))
    assert ours(documented()[case.title]) == found, "run: python -m tests.hostile"


def test_the_table_has_no_other_rows() -> None:
    assert list(documented()) == [case.title for case in CASES]
