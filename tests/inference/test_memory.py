"""`--memory`: the fastest way that fits is taken, a refusal says what would fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from converter.common.errors import UsageError
from converter.common.units import human_bytes, parse_bytes
from converter.inference import memory
from converter.inference.memory import (
    ActivationFootprint,
    ActivationOffload,
    MemoryPlan,
    footprint_of_gradients,
    footprint_of_plans,
    plan_memory,
    process_bytes,
)
from converter.inference.positions import TokenSpans, token_spans, widest_rows
from converter.model.mask import FULL, SLIDING, Mask
from converter.model.source import Source, open_source
from converter.plan.plan import switched_plans
from tests.conftest import LAYERS, run_cli
from tests.inference.conftest import Killed, killed
from tests.runners import example_of
from tests.tiny import tiny_model

Calibrate = Callable[..., dict[str, Any]]
MASK = Mask(16)
EXAMPLE = example_of(60, 4)
SPANS = token_spans(EXAMPLE, MASK)
DEPTH = 24


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A model whose layers are most of it."""
    sizes = {"num_hidden_layers": DEPTH, "hidden_size": 128, "intermediate_size": 512}
    return open_source(str(tiny_model(tmp_path_factory.mktemp("memory") / "m", **sizes)))


@pytest.fixture(autouse=True)
def small_process(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """What this process takes now is no part of the arithmetic."""
    if "source" in request.fixturenames:
        monkeypatch.setattr(memory, "process_bytes", lambda: 10_000_000)


def weights_of(source: Source) -> int:
    return sum(path.stat().st_size for path in source.folder.glob("*.safetensors"))


def footprint(spans: TokenSpans = SPANS, *, gradient: bool = False) -> ActivationFootprint:
    plans = switched_plans(FULL, range(DEPTH), DEPTH)
    one_way = footprint_of_plans(plans, spans, MASK)
    return footprint_of_gradients(DEPTH, spans) if gradient else one_way


def choose(
    source: Source, amount: int, examples: int = 32, kept: ActivationFootprint | None = None
) -> MemoryPlan:
    return plan_memory(source, "float32", examples, SPANS, kept or footprint(), amount)


def rung(source: Source, amount: int, kept: ActivationFootprint | None) -> tuple[int, int]:
    """How much memory it is: refused, on disk, read in turn, all in memory."""
    try:
        memory_plan = choose(source, amount, kept=kept)
    except UsageError:
        return 0, 0
    at = (1 if memory_plan.offloaded else 2) if memory_plan.streamed else 3
    return at, memory_plan.group


def threshold(
    source: Source, wanted: tuple[int, int], kept: ActivationFootprint | None = None
) -> int:
    """The least amount that gives at least a rung, by bisection."""
    low, high = 1, 2**36
    while low < high:
        middle = (low + high) // 2
        enough = rung(source, middle, kept) >= wanted
        low, high = (low, middle) if enough else (middle + 1, high)
    return low


@pytest.mark.parametrize("gradient", [False, True])
def test_more_memory_is_never_a_slower_way(source: Source, gradient: bool) -> None:
    kept = footprint(gradient=gradient)
    rungs = [rung(source, amount, kept) for amount in range(10**6, 10**8, 200_000)]
    assert [first for first, _ in rungs] == sorted(first for first, _ in rungs)
    assert {first for first, _ in rungs} == {0, 1, 2, 3}
    groups = {group for first, group in rungs if first == 2}
    # In memory at least eight together, or all; on disk any number.
    assert min(groups) >= 8
    assert max(groups) <= 32


def test_the_whole_model_is_kept_where_it_fits(source: Source) -> None:
    least = threshold(source, (3, 0))
    why = f"the whole model fits into {human_bytes(least)}"
    assert choose(source, least) == MemoryPlan(False, 1, False, 256, why)
    # With room to spare, more rows run at once.
    roomy = choose(source, 10**9)
    assert (roomy.streamed, roomy.batch_rows) == (False, 4096)
    assert choose(source, least - 1).streamed
    assert least > weights_of(source) + 10_000_000


def test_layers_are_read_in_turn_in_far_less_than_the_model(source: Source) -> None:
    least = threshold(source, (1, 1), footprint_of_gradients(DEPTH, SPANS))
    assert least - 10_000_000 < weights_of(source)
    offloaded = choose(source, threshold(source, (1, 0)))
    assert (offloaded.streamed, offloaded.offloaded) == (True, True)
    for words in ("24 layers of", "read in turn within", "waiting on disk"):
        assert words in offloaded.why
    streamed = choose(source, threshold(source, (2, 0)))
    assert streamed.group >= 8
    assert f"{streamed.group} examples together, in memory" in streamed.why


def test_few_examples_may_all_wait_in_memory(source: Source) -> None:
    """Fewer than eight together are enough when there are no more."""
    amount = threshold(source, (2, 0)) - 1
    many, few = choose(source, amount), choose(source, amount, examples=3)
    assert (many.offloaded, few.offloaded) == (True, False)
    assert few.group == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("amount", [1, 10**6, 12 * 10**6])
def test_a_refusal_names_what_would_be_enough(
    source: Source, dtype: str, gradient: bool, amount: int
) -> None:
    """Whatever is printed can be given as it stands; and it is no exaggeration."""
    for prompt in (100, 517, 2000, 3001):
        spans = token_spans(example_of(prompt, 4), MASK)
        kept = footprint(spans, gradient=gradient)
        with pytest.raises(UsageError, match="not even layer by layer") as caught:
            plan_memory(source, dtype, 16, spans, kept, amount)
        told = caught.value.details["expected"]
        assert told.startswith("at least ")
        enough = parse_bytes(told.removeprefix("at least "))
        memory_plan = plan_memory(source, dtype, 16, spans, kept, enough)
        assert memory_plan.streamed
        with pytest.raises(UsageError):
            plan_memory(source, dtype, 16, spans, kept, int(enough * 0.85))


def test_what_plans_and_gradients_keep() -> None:
    plans = switched_plans(SLIDING, range(4), 4)
    rows = widest_rows(plans, SPANS, MASK)
    assert footprint_of_plans(plans, SPANS, MASK).resting == rows
    assert footprint_of_plans(plans, SPANS, MASK).working >= rows
    assert footprint_of_gradients(4, SPANS).resting >= 5 * SPANS.end


def test_a_process_knows_what_it_takes() -> None:
    assert 10**7 < process_bytes() < 10**11


# --- the command ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrate(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Calibrate:
    """The command: from further options to the scores that it gives."""
    folder = tmp_path_factory.mktemp("calibrated")
    rows = [{"prompt": f"{'some words ' * (20 + i)}end.", "answer": f"yes {i}"} for i in range(10)]
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    command: list[object] = [
        *("calibrate", sources["qwen2"], "--data", data, "--samples", 10, "--window", 16),
        *("--device", "cpu", "-v"),
    ]

    def scores(*options: object) -> dict[str, Any]:
        out = folder / "scores.json"
        assert run_cli(*command, *options, "--out", out, "--force") == 0
        assert not list(folder.glob("*.work"))
        return dict(json.loads(out.read_text()))

    return scores


@pytest.fixture(scope="module")
def unlimited(calibrate: Calibrate) -> Calibrate:
    """The same, run once for the same options."""
    return cache(calibrate)


@pytest.mark.parametrize("way", ["whole", "streamed", "offloaded"])
@pytest.mark.parametrize("method", ["nll-restore", "path-integral"])
def test_a_memory_limit_changes_how_and_not_what(
    way: str,
    method: str,
    calibrate: Calibrate,
    unlimited: Calibrate,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = unlimited("--method", method)
    if way != "whole":
        # Nothing of a test's process says how much is left, so the choice is made here.
        memory_plan = MemoryPlan(True, 4, way == "offloaded", 4096, f"chosen to be {way}")
        monkeypatch.setattr(memory, "plan_memory", lambda *_: memory_plan)
    capsys.readouterr()
    found = calibrate("--method", method, "--memory", "64GB" if way == "whole" else "1GB")
    told = "the whole model fits into" if way == "whole" else f"chosen to be {way}"
    assert f"memory: {told}" in capsys.readouterr().err
    assert found["fingerprint"] == expected["fingerprint"], "memory is no part of what is measured"
    for key in ("race", "examples", "layer_forwards", "method", "mask"):
        assert found[key] == expected[key]
    for left, right in zip(found["per_example"], expected["per_example"], strict=True):
        assert left["scores"] == pytest.approx(right["scores"], abs=1e-5)
    ranking = [
        sorted(range(LAYERS), key=lambda i: -scores["layers"][i]["score"])
        for scores in (found, expected)
    ]
    assert ranking[0] == ranking[1]


def test_hidden_states_of_other_work_are_not_taken_up(
    calibrate: Calibrate, unlimited: Calibrate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that died under another window left its states; --fresh with ours must not use them."""
    memory_plan = MemoryPlan(True, 4, True, 4096, "on disk")
    monkeypatch.setattr(memory, "plan_memory", lambda *_: memory_plan)
    options = ("--method", "nll-restore", "--work", tmp_path / "work", "--memory", "1GB")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ActivationOffload, "drop", killed)
        calibrate(*options, "--window", 12)
    assert list((tmp_path / "work").rglob("states-*"))
    found, expected = calibrate(*options, "--fresh"), unlimited("--method", "nll-restore")
    for left, right in zip(found["layers"], expected["layers"], strict=True):
        assert left["score"] == pytest.approx(right["score"], abs=1e-5)
