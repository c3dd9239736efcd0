"""`--memory`: sizes are read, the fastest way that fits is taken, a refusal says what would fit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.common.errors import UsageError
from converter.common.units import human_bytes, parse_bytes
from converter.inference import memory
from converter.inference.memory import (
    ActivationFootprint,
    MemoryPlan,
    footprint_of_gradients,
    footprint_of_plans,
    plan_memory,
    process_bytes,
)
from converter.inference.positions import token_spans, widest_rows
from converter.model.mask import FULL, SLIDING, Mask
from converter.model.source import Source, open_source
from converter.plan.plan import switched_plans
from tests.conftest import LAYERS, run_cli
from tests.runners import example_of
from tests.tiny import tiny_model

MASK = Mask(16)
EXAMPLE = example_of(60, 4)
EXTENT = token_spans(EXAMPLE, MASK)
DEPTH = 24


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("4GB", 4 * 10**9),
        ("4 GB", 4 * 10**9),
        ("4G", 4 * 10**9),
        ("2GiB", 2 * 1024**3),
        (" 1.5 GiB ", 1536 * 1024**2),
        ("512MiB", 512 * 1024**2),
        ("1KiB", 1024),
        ("0.5KB", 500),
        ("1TB", 10**12),
        ("1TiB", 1024**4),
        ("700B", 700),
    ],
)
def test_a_size_is_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "GB", "-1GB", "4gb", "4XB", "4GBB", "1e3", "0", "0GB", "0.0", "4 G B", "1,5GB", "9" * 16,
     "nan", "inf", "4GB\n5"],
)  # fmt: skip
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="cannot be read") as caught:
        parse_bytes(text)
    assert caught.value.details["where"] == "--memory"


@given(st.integers(1, 2**49))
def test_a_size_that_we_print_can_be_given_back(count: int) -> None:
    text = human_bytes(count).replace(" bytes", "")
    assert parse_bytes(text) == pytest.approx(count, rel=0.06)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A model whose layers are most of it."""
    sizes = {"num_hidden_layers": DEPTH, "hidden_size": 128, "intermediate_size": 512}
    return open_source(str(tiny_model(tmp_path_factory.mktemp("memory") / "m", **sizes)))


@pytest.fixture(autouse=True)
def small_process(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """What this process takes now is no part of the arithmetic."""
    if "real" not in request.fixturenames:
        monkeypatch.setattr(memory, "process_bytes", lambda: 10_000_000)


def weights_of(source: Source) -> int:
    return sum(path.stat().st_size for path in source.folder.glob("*.safetensors"))


def footprint() -> ActivationFootprint:
    return footprint_of_plans(switched_plans(FULL, range(DEPTH), DEPTH), EXTENT, MASK)


def choose(
    source: Source, amount: int, examples: int = 32, kept: ActivationFootprint | None = None
) -> MemoryPlan | None:
    """The schedule, or None for a refusal."""
    try:
        return plan_memory(source, "float32", examples, EXTENT, kept or footprint(), amount)
    except UsageError:
        return None


def rung(memory_plan: MemoryPlan | None) -> tuple[int, int]:
    """How much memory a schedule is for: refused, on disk, read in turn, all in memory."""
    if memory_plan is None:
        return 0, 0
    if not memory_plan.streamed:
        return 3, 0
    return (1 if memory_plan.offloaded else 2), memory_plan.group


def threshold(
    source: Source, wanted: tuple[int, int], kept: ActivationFootprint | None = None
) -> int:
    """The least amount that gives at least a rung, by bisection."""
    low, high = 1, 2**36
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if rung(choose(source, middle, kept=kept)) >= wanted else (
            middle + 1, high,
        )  # fmt: skip
    return low


@pytest.mark.parametrize("gradient", [False, True])
def test_more_memory_is_never_a_slower_way(source: Source, gradient: bool) -> None:
    kept = footprint_of_gradients(DEPTH, EXTENT) if gradient else footprint()
    rungs = [rung(choose(source, amount, kept=kept)) for amount in range(10**6, 10**8, 200_000)]
    assert [first for first, _ in rungs] == sorted(first for first, _ in rungs)
    assert {first for first, _ in rungs} == {0, 1, 2, 3}
    groups = {group for first, group in rungs if first == 2}
    # In memory at least eight together, or all; on disk any number.
    assert min(groups) >= 8
    assert max(groups) <= 32


def test_the_whole_model_is_kept_where_it_fits(source: Source) -> None:
    least = threshold(source, (3, 0))
    assert choose(source, least) == MemoryPlan(
        False, 1, False, 256, f"the whole model fits into {human_bytes(least)}"
    )
    # With room to spare, more rows run at once.
    roomy = choose(source, 10**9)
    assert roomy is not None
    assert (roomy.streamed, roomy.batch_rows) == (False, 4096)
    before = choose(source, least - 1)
    assert before is not None
    assert before.streamed
    assert least > weights_of(source) + 10_000_000


def test_layers_are_read_in_turn_in_far_less_than_the_model(source: Source) -> None:
    least = threshold(source, (1, 1), footprint_of_gradients(DEPTH, EXTENT))
    assert least - 10_000_000 < weights_of(source)
    offloaded = choose(source, threshold(source, (1, 0)))
    assert offloaded is not None
    assert (offloaded.streamed, offloaded.offloaded) == (True, True)
    for words in ("24 layers of", "read in turn within", "waiting on disk"):
        assert words in offloaded.why
    streamed = choose(source, threshold(source, (2, 0)))
    assert streamed is not None
    assert streamed.group >= 8
    assert f"{streamed.group} examples together, in memory" in streamed.why


def test_few_examples_may_all_wait_in_memory(source: Source) -> None:
    """Fewer than eight together are enough when there are no more."""
    amount = threshold(source, (2, 0)) - 1
    many, few = choose(source, amount), choose(source, amount, examples=3)
    assert many is not None
    assert few is not None
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
        plans = switched_plans(SLIDING, range(DEPTH), DEPTH)
        kept = (
            footprint_of_gradients(DEPTH, spans)
            if gradient
            else footprint_of_plans(plans, spans, MASK)
        )
        with pytest.raises(UsageError, match="not even layer by layer") as caught:
            plan_memory(source, dtype, 16, spans, kept, amount)
        told = re.fullmatch(r"at least (.*)", caught.value.details["expected"])
        assert told
        enough = parse_bytes(told[1].replace(" bytes", ""))
        memory_plan = plan_memory(source, dtype, 16, spans, kept, enough)
        assert memory_plan.streamed
        with pytest.raises(UsageError):
            plan_memory(source, dtype, 16, spans, kept, int(enough * 0.85))


def test_what_plans_and_gradients_keep() -> None:
    plans = switched_plans(SLIDING, range(4), 4)
    rows = widest_rows(plans, EXTENT, MASK)
    assert footprint_of_plans(plans, EXTENT, MASK).resting == rows
    assert footprint_of_plans(plans, EXTENT, MASK).working >= rows
    assert footprint_of_gradients(4, EXTENT).resting >= 5 * EXTENT.end


@pytest.fixture
def real() -> None:
    """Ask for the process as it is."""


@pytest.mark.usefixtures("real")
def test_a_process_knows_what_it_takes() -> None:
    assert 10**7 < process_bytes() < 10**11


# --- the command ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated(
    sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[object], dict[str, object]]:
    """The command without --memory and the scores it gives."""
    folder = tmp_path_factory.mktemp("calibrated")
    rows = [{"prompt": f"{'some words ' * (20 + i)}end.", "answer": f"yes {i}"} for i in range(10)]
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    command: list[object] = [
        *("calibrate", sources["qwen2"], "--data", data, "--samples", 10, "--window", 16),
        *("--device", "cpu", "-v", "--method", "nll-restore"),
    ]
    out = folder / "scores.json"
    assert run_cli(*command, "--out", out) == 0
    return command, json.loads(out.read_text())


@pytest.mark.usefixtures("real")
@pytest.mark.parametrize("way", ["whole", "streamed", "spilled"])
@pytest.mark.parametrize("method", ["nll-restore", "first-order"])
def test_a_memory_limit_changes_how_and_not_what(
    way: str,
    method: str,
    calibrated: tuple[list[object], dict[str, object]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command, expected = calibrated
    out, options = tmp_path / "scores.json", ["--method", method]
    if method == "first-order":
        assert run_cli(*command, *options, "--out", out, "--force") == 0
        expected = json.loads(out.read_text())
    if way == "whole":
        memory_option = "64GB"
    else:
        # Nothing of a test's process says how much is left, so the choice is made here.
        memory_option = "1GB"
        memory_plan = MemoryPlan(True, 4, way == "spilled", 4096, f"chosen to be {way}")
        monkeypatch.setattr(memory, "plan_memory", lambda *_: memory_plan)
    capsys.readouterr()
    status = run_cli(*command, *options, "--out", out, "--memory", memory_option, "--force")
    assert status == 0
    talk = capsys.readouterr().err
    told = "memory: the whole model fits into" if way == "whole" else f"memory: chosen to be {way}"
    assert told in talk
    found = json.loads(out.read_text())
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
    assert not list(tmp_path.glob("*.work"))


@pytest.mark.usefixtures("real")
def test_hidden_states_of_other_work_are_not_taken_up(
    calibrated: tuple[list[object], dict[str, object]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run that died under another window left its states; --fresh with ours must not use them."""
    from converter.inference.memory import ActivationOffload

    class Stop(Exception):  # noqa: N818 - stands for a kill
        pass

    def fails(*_: object) -> None:
        raise Stop

    command, expected = calibrated
    memory_plan = MemoryPlan(True, 4, True, 4096, "on disk")
    monkeypatch.setattr(memory, "plan_memory", lambda *_: memory_plan)
    out, work = tmp_path / "scores.json", tmp_path / "work"
    options = ("--out", out, "--work", work, "--memory", "1GB")
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(ActivationOffload, "drop", fails)
        run_cli(*command, *options, "--window", 12)
    assert list(work.rglob("states-*"))
    assert run_cli(*command, *options, "--fresh", "-q") == 0
    found = json.loads(out.read_text())
    for left, right in zip(found["layers"], expected["layers"], strict=True):  # type: ignore[call-overload]
        assert left["score"] == pytest.approx(right["score"], abs=1e-5)
