"""Scores: means with errors, layer by layer, and files that are read back or refused."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.calibration.scores import (
    NATS,
    ExampleScores,
    Race,
    Scores,
    means,
    rank,
)
from converter.calibration.scores_file import load_scores
from converter.common.errors import ScoresError
from converter.common.files import write_json
from converter.common.statistics import Estimate, estimate, share
from converter.model.mask import Mask

FINITE = st.floats(-1e6, 1e6)
LOSS = st.floats(0, 100)


def example(full: float | None, sliding: float | None, *scores: float | None) -> ExampleScores:
    return ExampleScores("pair", 100, 4, full, sliding, scores)


def scores_of(*examples: ExampleScores, method: str = "nll-restore", **more: Any) -> Scores:
    fingerprint = {"source": "abc", "data": "def"}
    more.setdefault("order", rank(means(examples)))
    return Scores(method, Mask(16, 2), examples, 24.5, fingerprint, **more)


@given(st.lists(FINITE, min_size=2, max_size=30))
def test_an_estimate_is_that_of_the_statistics_module(values: list[float]) -> None:
    found = estimate(values)
    assert math.isclose(found.mean, statistics.fmean(values), rel_tol=1e-9, abs_tol=1e-9)
    expected = statistics.stdev(values) / math.sqrt(len(values))
    assert found.stderr is not None
    assert math.isclose(found.stderr, expected, rel_tol=1e-6, abs_tol=1e-6)


def test_an_estimate_is_never_shown_without_its_error() -> None:
    assert estimate([2.5]) == Estimate(2.5, None)
    assert str(Estimate(1.23456, 0.0456)) == "1.235 ± 0.046"
    assert str(Estimate(1.0, None)) == "1.000 ± ?"


EXAMPLES = (example(1.0, 3.0, 0.5, 1.5, 0.0), example(1.0, 5.0, 2.5, 0.5, 0.0))


def test_a_layers_score_is_the_mean_over_examples_with_its_error() -> None:
    layers = scores_of(*EXAMPLES).estimates
    assert [layer.mean for layer in layers] == [1.5, 1.0, 0.0]
    # Paired by example: the gains of layer 0 are 0.5 and 2.5.
    assert layers[0].stderr == pytest.approx(1.0)
    assert layers[2].stderr == 0.0
    assert scores_of(*EXAMPLES).order == (0, 1, 2)


def test_a_layer_is_judged_by_the_examples_it_was_scored_on() -> None:
    scores = scores_of(example(1.0, 3.0, 2.0, 1.0), example(1.0, 5.0, None, 3.0))
    assert scores.of_unit(0) == [2.0]
    assert scores.estimates == (Estimate(2.0, None), Estimate(2.0, 1.0))
    assert [layer["examples"] for layer in scores.to_json()["layers"]] == [1, 2]


def test_ends_that_were_not_measured_have_no_estimate() -> None:
    assert scores_of(example(None, 3.0, 1.0)).to_json()["nll"] == {
        "sliding": {"mean": 3.0, "stderr": None}
    }
    mixed = scores_of(example(None, 3.0, 1.0), example(1.0, 3.0, 1.0))
    assert mixed.to_json()["nll"].keys() == {"sliding"}


@given(st.lists(st.tuples(LOSS | st.none(), LOSS, *[FINITE | st.none()] * 2, FINITE), min_size=1))
def test_scores_survive_json(rows: list[tuple[Any, ...]]) -> None:
    scores = scores_of(example(1.0, 2.0, 0.0, 0.0, 0.0), *(example(*row) for row in rows))
    value = json.loads(json.dumps(scores.to_json(), allow_nan=False))
    read = tuple(ExampleScores.from_json(record) for record in value["per_example"])
    assert read == scores.examples


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"race": Race(1, (1,), (0,), (0,), ((2, 3),))},
        {"race": Race(2), "controls": {"null_largest": 0.0}},
        {"method": "gates", "unit": "gates", "heads": ((0.5, 1.0), (0.0, 0.25), (1.0, 0.1))},
    ],
    ids=str,
)
def test_a_scores_file_is_read_back(more: dict[str, Any], tmp_path: Path) -> None:
    scores = scores_of(*EXAMPLES, example(None, 1.0, None, 0.5, None), **more)
    write_json(tmp_path / "scores.json", scores.to_json())
    assert load_scores(tmp_path / "scores.json") == scores


def test_a_file_of_an_earlier_version_names_no_unit_and_maybe_a_method_that_is_gone(
    tmp_path: Path,
) -> None:
    value = scores_of(*EXAMPLES).to_json()
    assert value.pop("unit") == NATS
    units = {"nll-restore": NATS, "surrogate": NATS, "kl-all": "nats per token"}
    for method, unit in (units | {"lazy": "share of attention out of sight"}).items():
        (tmp_path / "scores.json").write_text(json.dumps(value | {"method": method}))
        scores = load_scores(tmp_path / "scores.json")
        assert (scores.method, scores.unit) == (method, unit)


def test_an_order_is_by_mean_or_not() -> None:
    assert scores_of(*EXAMPLES).by_mean
    assert not scores_of(*EXAMPLES, order=(2, 0, 1)).by_mean
    # What a race decided comes first, and only the open layers follow by mean.
    assert scores_of(*EXAMPLES, order=(2, 0, 1), race=Race(1, (2,))).by_mean


def test_the_file_says_what_the_contract_promises() -> None:
    value = scores_of(*EXAMPLES).to_json()
    assert value["method"] == "nll-restore"
    mask = {"window_tokens": 16, "sink_tokens": 2, "full_attention_decode": False}
    layer = {"index": 0, "score": 1.5, "stderr": pytest.approx(1.0), "examples": 2}
    assert (value["mask"], value["layers"][0]) == (mask, layer)
    assert (value["examples"], value["layer_forwards"]) == (2, 24.5)
    # Time differs from run to run, and equal measurements give equal files.
    assert "seconds" not in json.dumps(value)
    assert value["fingerprint"] == {"source": "abc", "data": "def"}
    assert value["nll"]["full"] == {"mean": 1.0, "stderr": 0.0}
    assert value["nll"]["sliding"] == {"mean": 4.0, "stderr": 1.0}


def altered(tmp_path: Path, **changes: Any) -> Path:
    """A scores file of three layers, or of the two that other records have."""
    path = tmp_path / "scores.json"
    order = {"order": [1, 0]} if "per_example" in changes else {}
    path.write_text(json.dumps(scores_of(*EXAMPLES).to_json() | order | changes))
    return path


def record(**changes: Any) -> dict[str, Any]:
    return asdict(example(1.0, 2.0, 1.0, 1.0)) | changes


RACE = asdict(Race(1))


def raced(**changes: Any) -> dict[str, Any]:
    return {"race": RACE | changes}


def test_the_record_that_is_altered_below_is_good(tmp_path: Path) -> None:
    assert load_scores(altered(tmp_path, per_example=[record()])).order == (1, 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": 1},
        {"format_version": 2},
        {"order": [0, 0, 1]},
        {"order": [0, 1]},
        {"order": [0.0, 1.0, 2.0]},
        {"order": None},
        {"contest": 3},
        {"contest": {"keep": 1}},
        {"profiles": {"pair": [0]}},
        {"profiles": [1]},
        {"method": None},
        {"method": ""},
        {"method": "two\nlines"},
        {"method": "\x1b[31m"},
        {"method": "x" * 100},
        {"unit": None},
        {"unit": ["nats"]},
        {"unit": "\x1b[31m"},
        {"method": {}},
        {"mask": {"window_tokens": 16}},
        {"per_example": []},
        {"per_example": "none"},
        {"per_example": [record(), record(scores=[1.0])]},
        {"per_example": [record(full="1")]},
        {"per_example": [record(sliding=[2.0])]},
        {"per_example": [record(scores=None)]},
        {"per_example": [record(scores=[])]},
        {"per_example": [record(scores=[1.0, "x"])]},
        {"per_example": [record(scores=[1.0, float("nan")])]},
        {"per_example": [record(scores=[1.0, None]), record(scores=[1.0, None])]},
        {"heads": 3},
        {"heads": {}},
        {"heads": []},
        {"heads": [1.0, 1.0, 1.0]},
        {"heads": [[1.0], [1.0]]},
        {"heads": [[], [], []]},
        {"heads": [[1.0], [1.0, 0.5], [1.0]]},
        {"heads": [[1.0], ["x"], [1.0]]},
        {"heads": [[1.0], [True], [1.0]]},
        {"heads": [[1.0], [float("nan")], [1.0]]},
        {"heads": [[1.0], [10**400], [1.0]]},
        {"race": 3},
        {"race": []},
        {"race": {"keep": 1}},
        raced(accepted=[0, 0]),
        raced(accepted=[0], rejected=[0]),
        raced(accepted=[3]),
        raced(rejected=[-1]),
        raced(accepted=None),
        raced(accepted=3),
        raced(rounds=[[1]]),
        raced(rounds=[[1, "x"]]),
        raced(rounds=None),
        raced(keep="two"),
        raced(keep=None),
        *({"race": {k: v for k, v in RACE.items() if k != gone}} for gone in RACE),
        {"per_example": [record(full=10**400)]},
        {"per_example": [record(full=float("nan"))]},
        {"per_example": [record(full=float("inf"))]},
        {"per_example": [record(unknown=1)]},
        {"layer_forwards": None},
        {"fingerprint": 3},
    ],
    ids=str,
)
def test_a_damaged_file_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    path = altered(tmp_path, **changes)
    with pytest.raises(ScoresError) as caught:
        load_scores(path)
    assert caught.value.details["where"] == str(path)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ScoresError) as caught:
        load_scores(tmp_path / "none.json")
    assert "hybridize calibrate" in caught.value.details["next step"]


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Published values of the score interval (Newcombe 1998, table I, method 3).
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_share_has_wilsons_interval(right: int, n: int, low: float, high: float) -> None:
    found = share(right, n)
    assert found.accuracy == right / n
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
