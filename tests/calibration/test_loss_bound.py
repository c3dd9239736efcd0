"""Budgets of loss: as few full layers as a bound allows, held against scanning all counts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise, permutations
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from converter.calibration.comparison import within_bound
from converter.calibration.data.examples import load_examples
from converter.calibration.data.settings import DataSettings
from converter.common.errors import DataError
from converter.inference.example import Example
from converter.inference.tokenizer import load_tokenizer
from converter.model.mask import Mask
from converter.plan.plan import layer_types_of
from tests.conftest import LAYERS, run_cli
from tests.runners import MASKS, Plain, example_of, random_rows, run, silent

Captured = pytest.CaptureFixture[str]
Order = tuple[int, ...]
Scan = Callable[[Order], list[float]]

pytestmark = pytest.mark.usefixtures("exactly")

EXAMPLES = tuple(example_of(50 + i, 2, seed=8) for i in range(4))


def scanner(folder: Path, mask: Mask, examples: Sequence[Example]) -> Scan:
    """The loss above the original of every front of an order, one pass over the model each."""
    plain = Plain(folder, mask)
    full = [plain.nll(e, layer_types_of(range(LAYERS), LAYERS)) for e in examples]

    @cache
    def above(layers: frozenset[int]) -> float:
        kinds = layer_types_of(layers, LAYERS)
        return fmean(plain.nll(e, kinds) - f for e, f in zip(examples, full, strict=True))

    return lambda order: [above(frozenset(order[:count])) for count in range(LAYERS + 1)]


def falling_order(scan: Scan) -> Order:
    """An order along which the loss falls from layer to layer."""
    orders = permutations(range(LAYERS))
    return next(order for order in orders if all(a > b for a, b in pairwise(scan(order))))


@pytest.fixture(scope="module")
def scan(sources: dict[str, Path], exactly: None) -> Scan:  # noqa: ARG001 - its passes are exact
    return scanner(sources["mistral"], MASKS["plain"], EXAMPLES)


def bounded(folder: Path, work: Path, order: Order, bound: float) -> Any:
    measured = run(folder, EXAMPLES[:1], MASKS["plain"], work)
    measured = replace(measured, examples=replace(measured.examples, validation=EXAMPLES))
    return within_bound(measured, order, bound, silent)


def test_where_losses_fall_no_smaller_front_is_within(
    scan: Scan, sources: dict[str, Path], tmp_path: Path
) -> None:
    order = falling_order(scan)
    losses, counts = scan(order), set()
    around = [x + sign * 1e-6 for x in losses[:-1] for sign in (-1, 1) if x > 0]
    for bound in (0.0, losses[0] + 1, *around):
        found = bounded(sources["mistral"], tmp_path, order, bound)
        smallest = next(count for count, loss in enumerate(losses) if loss <= bound)
        assert found.found.layers == frozenset(order[:smallest])
        assert found.found.loss - found.full.loss == pytest.approx(losses[smallest], abs=1e-9)
        counts.add(smallest)
    assert counts == set(range(LAYERS + 1))


def test_whatever_the_order_the_front_is_within_and_one_shorter_is_not(
    scan: Scan, sources: dict[str, Path], tmp_path: Path
) -> None:
    rising = 0
    for order in permutations(range(LAYERS)):
        losses = scan(order)
        rising += any(a < b for a, b in pairwise(losses))
        bound = max(0.0, sorted(losses)[2] + 1e-6)
        layers = bounded(sources["mistral"], tmp_path, order, bound).found.layers
        assert layers == frozenset(order[: len(layers)])
        assert losses[len(layers)] <= bound
        assert not layers or losses[len(layers) - 1] > bound
    assert rising


def test_a_bound_without_examples_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    measured = run(sources["mistral"], EXAMPLES, MASKS["plain"], tmp_path)
    with pytest.raises(DataError, match="no example is left"):
        within_bound(measured, range(LAYERS), 0.1, silent)


SAMPLES, VALIDATION, WINDOW = 3, 4, 16


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Which examples."""
    path = random_rows(tmp_path_factory.mktemp("data"), SAMPLES + VALIDATION)
    data = ["--data", path, "--samples", SAMPLES, "--validation", VALIDATION, "--holdout", 0]
    return [*data, "--dtype", "float64", "--device", "cpu"]


@pytest.fixture(scope="module")
def fronts(options: list[object], sources: dict[str, Path], exactly: None) -> Scan:  # noqa: ARG001
    """Losses on the validation examples of these options."""
    settings = DataSettings(str(options[1]), SAMPLES, VALIDATION, 0, 480, 1, 512, 0)
    tokenizer, mask = load_tokenizer(sources["mistral"]), Mask(WINDOW)
    examples = load_examples(tokenizer, settings, mask, LAYERS, 512)
    assert len(examples.validation) == VALIDATION
    return scanner(sources["mistral"], mask, examples.validation)


@pytest.fixture
def scores(
    options: list[object], fronts: Scan, sources: dict[str, Path], tmp_path: Path
) -> tuple[Path, Order]:
    """A scores file whose order is one along which those losses fall."""
    out = tmp_path / "scores.json"
    data = [o for o in options if o not in ("--holdout", 0)]
    command = ("calibrate", sources["mistral"], *data, "--window", WINDOW, "--out", out, "-q")
    assert run_cli(*command, "--method", "kl") == 0
    order = falling_order(fronts)
    value = json.loads(out.read_text())
    out.write_text(json.dumps(value | {"order": list(order)}))
    return out, order


def test_a_plan_keeps_the_fewest_layers_that_the_bound_allows(
    options: list[object],
    fronts: Scan,
    scores: tuple[Path, Order],
    sources: dict[str, Path],
    tmp_path: Path,
    capsys: Captured,
) -> None:
    file, order = scores
    losses = fronts(order)
    for count, loss in enumerate(losses[:-1]):
        if loss < 0:
            continue
        for bound, expected in ((loss + 1e-5, count), (max(0.0, loss - 1e-5), count + 1)):
            out = tmp_path / "plan.json"
            budget = ("--scores", file, "--budget", f"nll:{bound:.12f}", "--out", out, "--force")
            assert run_cli("plan", sources["mistral"], *budget, *options) == 0
            talk = capsys.readouterr().err
            plan = json.loads(out.read_text())
            assert plan["full_attention_layers"] == sorted(order[:expected])
            assert plan["budget"] == f"nll:{bound:.12f}"
            assert f"{expected} full layers keep within" in talk
            assert f"on {VALIDATION} examples" in talk
            assert f"{expected}: {losses[expected]:+.3f}" in talk
    assert {path.name for path in tmp_path.iterdir()} == {"scores.json", "plan.json"}


def test_a_conversion_meets_its_bound(
    options: list[object], fronts: Scan, sources: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = ("--method", "search", "--budget", "nll:0.2", "--window", WINDOW, "--no-verify", "-q")
    assert run_cli("convert", sources["mistral"], out, *options, *asked) == 0
    plan = json.loads((out / "hybrid" / "plan.json").read_text())
    ranking, count = tuple(plan["ranking"]), len(plan["full_attention_layers"])
    assert plan["full_attention_layers"] == sorted(ranking[:count])
    losses = fronts(ranking)
    assert losses[count] <= 0.2
    assert count == 0 or losses[count - 1] > 0.2
    # Nothing was compared, as nobody knew how many layers there are to be.
    assert (plan["budget"], plan["method"]) == ("nll:0.2", "search")
    assert json.loads((out / "hybrid" / "scores.json").read_text())["contest"] is None
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_method_that_measures_nothing_has_no_ranking_to_take_layers_from(
    sources: dict[str, Path], tmp_path: Path, capsys: Captured
) -> None:
    budget = ("--budget", "nll:0.1", "--method", "periodic")
    for command in (
        ("plan", sources["mistral"], *budget),
        ("convert", sources["mistral"], tmp_path / "out", *budget),
    ):
        assert run_cli(*command) == 2
        printed, error = capsys.readouterr()
        assert printed == ""
        assert "a loss bound takes layers from the front of a ranking" in error
        assert "--method periodic" in error
    assert list(tmp_path.iterdir()) == []


def test_retarget_cannot_measure(
    scores: tuple[Path, Order], sources: dict[str, Path], tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "out"
    given = ("--scores", scores[0], "--budget", 1, "--no-verify", "-q")
    assert run_cli("convert", sources["mistral"], out, *given) == 0
    before = (out / "hybrid" / "plan.json").read_bytes()
    capsys.readouterr()
    assert run_cli("retarget", out, "--budget", "nll:0.1") == 2
    printed, error = capsys.readouterr()
    assert printed == ""
    for words in ("only once plans have been measured", "--budget", "number of layers", "nll:0.1"):
        assert words in error
    assert (out / "hybrid" / "plan.json").read_bytes() == before
