"""What the program prints, and on which stream."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.cli.console import Console
from converter.common.units import human_bytes

SIZES = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "PiB": 2**50}

Captured = pytest.CaptureFixture[str]


@given(st.integers(0, 2**62))
def test_a_size_is_shown_in_the_largest_unit_that_leaves_one(count: int) -> None:
    number, unit = human_bytes(count).split()
    shown = float(number) * SIZES[unit]
    # One decimal of the unit.
    assert abs(shown - count) <= 0.0500001 * SIZES[unit]
    assert unit == "bytes" or count >= SIZES[unit]
    assert unit == "PiB" or count < 1024 * SIZES[unit]


def test_known_sizes() -> None:
    known = {0: "0 bytes", 1023: "1023 bytes", 1024: "1.0 KiB", 1536: "1.5 KiB", 2**31: "2.0 GiB"}
    assert {count: human_bytes(count) for count in known} == known


def test_a_result_is_one_json_object_and_nothing_else(capsys: Captured) -> None:
    Console(True, 0).result({"é": [1, None]}, lambda: print("table"))  # noqa: T201
    out, err = capsys.readouterr()
    assert json.loads(out) == {"é": [1, None]}
    assert (out.count("\n"), err) == (1, "")


def test_a_result_is_shown_without_json(capsys: Captured) -> None:
    Console(False, 0).result({"a": 1}, lambda: print("table"))  # noqa: T201
    assert capsys.readouterr().out == "table\n"


def test_a_result_that_is_no_json_is_not_printed(capsys: Captured) -> None:
    with pytest.raises(ValueError, match="JSON"):
        Console(True, 0).result({"loss": float("nan")}, lambda: None)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("verbosity", "heard"), [(-1, ""), (0, "hello\n"), (1, "hello\n")])
def test_talk_goes_to_stderr_unless_quiet(verbosity: int, heard: str, capsys: Captured) -> None:
    Console(False, verbosity).say("hello")
    out, err = capsys.readouterr()
    assert (out, err) == ("", heard)


def test_a_terminal_gets_whole_words(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "16")
    command = "  hybridize run somewhere"
    text = f"held-out examples\n\n/a-path-that-is-not-broken\n{command}"
    for console in (Console(False, 0).print, Console(False, 0).say, Console(False, 0).warn):
        console(text)
    assert text in capsys.readouterr().out
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True)
    for console in (Console(False, 0).print, Console(False, 0).say, Console(False, 0).warn):
        console(text)
        shown = re.sub(r"\x1b\[\d+m", "", "".join(capsys.readouterr()))
        assert shown == text.replace("held-out ", "held-out\n") + "\n"


def test_results_are_printed_even_when_quiet(capsys: Captured) -> None:
    console = Console(False, -1)
    console.print("result")
    console.pairs([("a", "1"), ("long name", "2")])
    assert capsys.readouterr().out == "result\n  a          1\n  long name  2\n"


def test_a_table_shows_every_cell_whole(capsys: Captured) -> None:
    long = "word " * 20
    rows = [("[bold]a", 1, long), ("b", 20, ":smile:")]
    Console(False, 0).table(("name", "count", "note"), rows)
    out, err = capsys.readouterr()
    for cell in ("name", "count", "note", "[bold]a", long.strip(), ":smile:"):
        assert cell in out
    assert err == ""
    lines = [line for line in out.splitlines() if "1  " in line or "20" in line]
    # Numbers line up on the right.
    assert lines[0].index("1") == lines[1].index("20") + 1


@pytest.mark.parametrize("columns", [30, 60, 80, 200])
def test_no_terminal_is_too_narrow_for_a_digit(
    columns: int, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    titles = ("layer", "nll-restore (nats per answer token)", "rank", "held-out accuracy", "note")
    rows = [(layer, "-0.022 ± 0.016", 41, "0.123 [0.045, 0.678]", "a b c d") for layer in (7, 12)]
    Console(False, 0).table(titles, rows)
    lines = re.sub(r"\x1b\[\d+m", "", capsys.readouterr().out).splitlines()
    for cell in ("-0.022 ± 0.016", "41", "0.123 [0.045, 0.678]", "12"):
        assert any(cell in line for line in lines)
    assert max(map(len, lines)) <= max(columns, 60)
    assert any(line.strip() == "layer 12" for line in lines) == (columns <= 60)


def test_a_table_without_rows_shows_its_columns(capsys: Captured) -> None:
    Console(False, 0).table(("name", "count"), [])
    assert "name" in capsys.readouterr().out


@pytest.mark.parametrize("verbosity", [-1, 0])
def test_progress_counts_to_the_end_and_prints_no_result(verbosity: int, capsys: Captured) -> None:
    with Console(False, verbosity).progress("scores", 5) as bar:
        bar.advance(2)
        bar.advance(3)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("100%" in err and "scores" in err) is (verbosity == 0)


@pytest.mark.parametrize("verbosity", [-1, 0])
def test_progress_takes_a_new_estimate_of_what_is_left(verbosity: int, capsys: Captured) -> None:
    """A race cannot know beforehand; what is done stays done."""
    with Console(False, verbosity).progress("scores", 0) as bar:
        bar.expect(8)
        bar.advance(2)
        bar.expect(1.5)
        bar.advance(1.5)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("100%" in err) is (verbosity == 0)
