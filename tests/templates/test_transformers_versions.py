"""Which releases of transformers compute our checkpoints: what we claim, record and refuse."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from converter.checkpoint.format import CODE_SINCE, CONFIGURATION_FILE, MODELING_FILE
from converter.common.resources import resource_dir
from converter.model.families import FAMILIES
from tests.transformers_versions import BEGIN, COLUMNS, END, HONOURED, PAGE, RELEASES, Bench


def number(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))


def recorded() -> dict[str, list[str]]:
    """The words of docs/engines.md, by release."""
    text = PAGE.read_text(encoding="utf-8")
    rows = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {release: words for release, *words in cells}


def test_every_release_is_recorded() -> None:
    assert tuple(recorded()) == RELEASES


@pytest.mark.parametrize(("place", "title"), list(enumerate(COLUMNS)), ids=str)
def test_what_is_claimed_is_what_was_recorded(place: int, title: str) -> None:
    native = {FAMILIES[case.family].native for case in COLUMNS[title] if not case.trust}
    claimed = {CODE_SINCE} if not native else {form.since for form in native if form is not None}
    (since,) = claimed
    for release, words in recorded().items():
        assert words[place].startswith(HONOURED) is (number(release) >= number(since)), release
        if not native:
            # Our own code never runs where it does not belong.
            assert words[place].startswith((HONOURED, "refused"))


def test_this_release_computes_every_checkpoint(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    for case, answer in bench.answers().items():
        assert bench.judge(case, answer)[0] == HONOURED, (case, answer.get("error"))


@pytest.mark.parametrize("name", [CONFIGURATION_FILE, MODELING_FILE])
def test_our_code_refuses_an_older_release_in_one_sentence(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.__version__", "5.3.0")
    message = (
        rf"^this checkpoint's code needs transformers {CODE_SINCE} or newer, not 5\.3\.0: "
        r"pip install -U transformers$"
    )
    with pytest.raises(ImportError, match=message):
        runpy.run_path(str(resource_dir("templates") / name))
