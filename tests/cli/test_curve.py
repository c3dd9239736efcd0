"""`plan --pareto`: the whole curve from the command line, its table and its picture."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from converter.calibration.data.examples import load_examples
from converter.calibration.data.settings import DataSettings
from converter.inference.tokenizer import load_tokenizer
from converter.model.mask import Mask
from converter.plan.plan import layer_types_of
from tests.conftest import CONTEXT, LAYERS, run_cli
from tests.runners import Plain, random_rows

Captured = pytest.CaptureFixture[str]

SAMPLES, HELD_OUT, WINDOW = 3, 4, 16


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_rows(tmp_path_factory.mktemp("data"), SAMPLES + HELD_OUT)


@pytest.fixture(scope="module")
def command(sources: dict[str, Path], rows: Path) -> list[object]:
    """The curve of a tiny model."""
    data = ["--data", rows, "--samples", SAMPLES, "--holdout", HELD_OUT, "--window", WINDOW]
    return ["plan", sources["mistral"], "--pareto", *data, "--dtype", "float64", "--device", "cpu"]


@pytest.fixture
def losses(sources: dict[str, Path], rows: Path, exactly: None) -> Any:  # noqa: ARG001
    """The held-out loss above the original of any full layers, by the whole model."""
    settings = DataSettings(str(rows), SAMPLES, 0, HELD_OUT, CONTEXT * 15 // 16, 1, 512, 0)
    tokenizer, mask = load_tokenizer(sources["mistral"]), Mask(WINDOW)
    examples = load_examples(tokenizer, settings, mask, LAYERS, CONTEXT).held_out
    assert len(examples) == HELD_OUT
    plain, full = Plain(sources["mistral"], mask), layer_types_of(range(LAYERS), LAYERS)
    return lambda layers: fmean(
        plain.nll(e, layer_types_of(layers, LAYERS)) - plain.nll(e, full) for e in examples
    )


def test_every_point_is_a_true_loss(
    command: list[object], losses: Any, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "curve.json"
    assert run_cli(*command, "--method", "search,kl,periodic", "--out", out, "--json") == 0
    printed, talk = capsys.readouterr()
    curve = json.loads(printed)
    assert re.findall(r"stage (\d of \d, \w+): ", talk) == [
        *("1 of 3, search", "2 of 3, kl", "3 of 3, quality")
    ]
    assert curve == json.loads(out.read_text())
    assert {path.name for path in tmp_path.iterdir()} == {"curve.json"}
    sizes = (curve["layers"], curve["examples"], curve["context_tokens"])
    assert sizes == (LAYERS, HELD_OUT, CONTEXT)
    points = curve["points"]
    for point in points:
        kept = point["full_attention_layers"]
        assert len(kept) == point["full_layers"]
        assert point["nll_above_original"]["mean"] == pytest.approx(losses(kept), rel=0, abs=1e-9)
    # Each method's own order at every count, every offset, and both ends.
    names = {(point["name"], point["full_layers"]) for point in points}
    offsets = {1: 4, 2: 2, 3: 2}
    assert names == {
        *((name, count) for name in ("search", "kl") for count in (1, 2, 3)),
        *((f"periodic, offset {i}", n) for n, offset in offsets.items() for i in range(offset)),
        *(("all sliding", 0), ("original", LAYERS)),
    }
    for name in ("search", "kl"):
        sets = [set(p["full_attention_layers"]) for p in points if p["name"] == name]
        assert sets[0] < sets[1] < sets[2]
    for point in [p for p in points if p["on_front"]]:
        fewer = [p for p in points if p["full_layers"] <= point["full_layers"]]
        least = min(p["nll_above_original"]["mean"] for p in fewer)
        assert point["nll_above_original"]["mean"] == pytest.approx(least, rel=0, abs=1e-12)


def test_scores_that_are_given_are_the_ones_it_is_of(
    command: list[object], sources: dict[str, Path], tmp_path: Path, capsys: Captured
) -> None:
    scores = tmp_path / "scores.json"
    data = [o for o in command[3:] if o not in ("--holdout", HELD_OUT)]
    measure = ("calibrate", sources["mistral"], *data, "--method", "nll-remove", "--out", scores)
    assert run_cli(*measure, "-q") == 0
    value = json.loads(scores.read_text())
    order = value["order"][::-1]
    scores.write_text(json.dumps(value | {"order": order}))
    # Under the mask that they were measured under, which need not be named again.
    less = [o for o in command if o not in ("--window", WINDOW)]
    capsys.readouterr()
    assert run_cli(*less, "--scores", scores, "--json", "-q") == 0
    points = json.loads(capsys.readouterr().out)["points"]
    mine = {p["full_layers"]: p for p in points if p["name"] == "nll-remove"}
    found = {count: point["full_attention_layers"] for count, point in mine.items()}
    assert found == {count: sorted(order[:count]) for count in (1, 2, 3)}
    assert mine[1]["kv_bytes"] < mine[2]["kv_bytes"]
    names = {point["name"].split(",")[0] for point in points}
    assert names == {"nll-remove", "periodic", "all sliding", "original"}
    assert run_cli(*command, "--window", 8, "--scores", scores) == 2
    assert "another mask" in capsys.readouterr().err


def test_the_table_and_the_picture_show_it(
    command: list[object], tmp_path: Path, capsys: Captured
) -> None:
    out, picture = tmp_path / "curve.json", tmp_path / "curve.png"
    options = ("--method", "kl", "--context", 400, "--out", out, "--picture", picture)
    assert run_cli(*command, *options) == 0
    printed, talk = capsys.readouterr()
    assert f"measured on {HELD_OUT} examples" in printed
    assert "KV cache at 400 tokens" in printed
    lines = [line.split() for line in printed.splitlines()]
    rows = {int(words[0]): words for words in lines if words and words[0].isdigit()}
    assert sorted(rows) == list(range(LAYERS + 1))
    assert [rows[count][1] for count in (1, 2, 3)] == ["kl"] * 3
    for point in json.loads(out.read_text())["points"]:
        if point["name"] == "kl":
            assert f"{point['nll_above_original']['mean']:.3f}" in rows[point["full_layers"]]
    assert f"curve: {out}" in talk and f"curve: {picture}" in talk
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert {path.name for path in tmp_path.iterdir()} == {"curve.json", "curve.png"}


def test_nothing_is_overwritten_unless_it_is_forced(
    command: list[object], tmp_path: Path, capsys: Captured
) -> None:
    for name, option in (("curve.json", "--out"), ("curve.png", "--picture")):
        file = tmp_path / name
        file.write_text("mine")
        options = ("--method", "kl", option, file, "-q")
        assert run_cli(*command, *options) == 2
        printed, error = capsys.readouterr()
        assert printed == ""
        assert str(file) in error and "--force" in error
        assert file.read_text() == "mine"
        assert run_cli(*command, *options, "--force") == 0
        assert file.read_bytes() != b"mine"
        capsys.readouterr()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--budget", "1/2"), ("over every number of layers", "--pareto", "also --budget")),
        (("--budget", "nll:0.1"), ("over every number of layers", "also --budget")),
        (("--layers", "1,2"), ("over every number of layers", "also --layers")),
        (("--holdout", 0), ("no held-out examples", "--holdout")),
        (("--samples", SAMPLES + HELD_OUT), ("no held-out examples", "--holdout")),
        (("--picture", "curve.txt"), ("ends in .png",)),
        (("--method", "periodic"), ("plans of several sizes need one order of the layers",)),
    ],
    ids=str,
)
def test_what_the_curve_does_not_go_with_is_refused(
    options: tuple[object, ...],
    says: tuple[str, ...],
    command: list[object],
    tmp_path: Path,
    capsys: Captured,
) -> None:
    out = tmp_path / "curve.json"
    assert run_cli(*command, *options, "--out", out, "-q") == 2
    printed, error = capsys.readouterr()
    assert printed == ""
    assert [words for words in says if words not in error] == []
    assert list(tmp_path.iterdir()) == []


def test_a_plan_has_no_picture(sources: dict[str, Path], tmp_path: Path, capsys: Captured) -> None:
    picture = tmp_path / "plan.png"
    assert run_cli("plan", sources["mistral"], "--layers", "1", "--picture", picture) == 2
    error = capsys.readouterr().err
    assert "only the curve has a picture" in error and "expected: --pareto" in error
    assert list(tmp_path.iterdir()) == []


def test_a_recipes_budget_does_not_matter(
    command: list[object], tmp_path: Path, capsys: Captured
) -> None:
    """It is the recipe's for a plan; the curve has all of them."""
    recipe = tmp_path / "mine.toml"
    recipe.write_text('budget = "1/2"\nmethod = "kl"\n')
    assert run_cli(*command, "--recipe", recipe, "--json", "-q") == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert {p["full_layers"] for p in points if p["name"] == "kl"} == {1, 2, 3}


def test_a_saved_curve_is_shown_and_drawn_again_without_measuring(
    command: list[object], sources: dict[str, Path], tmp_path: Path, capsys: Captured
) -> None:
    out, pictures = tmp_path / "curve.json", [tmp_path / f"{n}.png" for n in (1, 2)]
    assert run_cli(*command, "--method", "kl", "--out", out, "--picture", pictures[0]) == 0
    printed = capsys.readouterr().out
    again = ("plan", sources["mistral"], "--curve", out)
    assert run_cli(*again, "--picture", pictures[1]) == 0
    assert capsys.readouterr().out == printed
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert run_cli(*again, "--pareto", "--context", 100) == 2
    assert "--curve is measured already" in capsys.readouterr().err
    out.write_text(out.read_text().replace(f'"layers": {LAYERS}', f'"layers": {LAYERS + 1}'))
    assert run_cli(*again) == 2
    assert "not a saved curve" in capsys.readouterr().err
