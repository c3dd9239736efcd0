"""`--memory`: the fastest way that fits is taken, a refusal says what would fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from converter.common import devices
from converter.common.devices import DeviceMemory, Room, device_memory, room_on
from converter.common.errors import UsageError
from converter.common.units import human_bytes, parse_bytes
from converter.inference import memory
from converter.inference.load import Placement
from converter.inference.memory import (
    DEVICE,
    DISK,
    HOST,
    MemoryPlan,
    Workload,
    plan_memory,
    plan_spread,
)
from converter.inference.positions import rows_held, widest_rows
from converter.inference.waiting import ActivationOffload
from converter.model.mask import FULL, Mask
from converter.model.source import Source, open_source
from converter.plan.units import Units, switched_plans
from tests.conftest import LAYERS, make_model, run_cli
from tests.inference.conftest import Killed, killed
from tests.runners import example_of, ignore, resident
from tests.tiny import tiny_model

Calibrate = Callable[..., dict[str, Any]]
MASK = Mask(16)
OWN = 10_000_000
DEPTH = 24


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A model whose layers are most of it."""
    sizes = {"num_hidden_layers": DEPTH, "hidden_size": 128, "intermediate_size": 512}
    return open_source(str(tiny_model(tmp_path_factory.mktemp("memory") / "m", **sizes)))


def weights_of(source: Source) -> int:
    return sum(path.stat().st_size for path in source.folder.glob("*.safetensors"))


def workload_of(source: Source, **changes: Any) -> Workload:
    """Scoring 32 examples of 60 and 4 tokens."""
    usual = Workload(source, MASK, "float32", 32, 60, 4, gradient=False)
    return replace(usual, **changes)


def room(amount: int, host_bytes: int | None = None, own_bytes: int = OWN) -> Room:
    """What `--memory` allows to a process that has taken some already."""
    free = int(amount * 0.9) - own_bytes
    return Room(free, host_bytes, own_bytes, human_bytes(amount), asked=True)


def rung(workload: Workload, amount: int, host_bytes: int | None = None) -> tuple[int, int]:
    """How much memory it is: refused, on disk, in main memory, read in turn, all on the device."""
    try:
        memory_plan = plan_memory(workload, room(amount, host_bytes))
    except UsageError:
        return 0, 0
    at = [DISK, HOST, DEVICE].index(memory_plan.waiting) + 1 if memory_plan.streamed else 4
    return at, memory_plan.group


def threshold(workload: Workload, wanted: tuple[int, int]) -> int:
    """The least amount that gives at least a rung, by bisection."""
    low, high = 1, 2**36
    while low < high:
        middle = (low + high) // 2
        enough = rung(workload, middle) >= wanted
        low, high = (low, middle) if enough else (middle + 1, high)
    return low


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("host_bytes", [None, 10**9], ids=["cpu", "gpu"])
def test_more_memory_is_never_a_slower_way(
    source: Source, gradient: bool, host_bytes: int | None
) -> None:
    workload = workload_of(source, gradient=gradient)
    rungs = [rung(workload, amount, host_bytes) for amount in range(10**6, 10**8, 10**6)]
    assert [first for first, _ in rungs] == sorted(first for first, _ in rungs)
    # States wait on disk only where main memory is the device's own, or full.
    assert {first for first, _ in rungs} - {0, 4} == ({1, 3} if host_bytes is None else {2, 3})
    groups = {group for first, group in rungs if first in (2, 3)}
    # Waiting in memory at least eight together, if not even on disk there could be more.
    assert min(groups) >= 8 or (gradient and host_bytes is not None)
    assert max(groups) <= 32


def test_the_whole_model_is_kept_where_it_fits(source: Source) -> None:
    workload = workload_of(source)
    least = threshold(workload, (4, 0))
    why = f"the whole model fits into {human_bytes(least)}"
    assert plan_memory(workload, room(least)) == MemoryPlan(False, 1, DEVICE, None, 256, why)
    # With room to spare, more rows run at once.
    roomy = plan_memory(workload, room(10**9))
    assert (roomy.streamed, roomy.batch_rows) == (False, 4096)
    assert plan_memory(workload, room(least - 1)).streamed
    assert least > workload.weight_bytes + OWN
    assert workload.weight_bytes == pytest.approx(weights_of(source), rel=0.01)


def test_layers_are_read_in_turn_in_far_less_than_the_model(source: Source) -> None:
    least = threshold(workload_of(source, gradient=True), (1, 1))
    assert least - OWN < weights_of(source)
    offloaded = plan_memory(workload_of(source), room(threshold(workload_of(source), (1, 0))))
    assert (offloaded.streamed, offloaded.waiting) == (True, DISK)
    for words in ("24 layers of", "read in turn within", "waiting on disk"):
        assert words in offloaded.why
    streamed = plan_memory(workload_of(source), room(threshold(workload_of(source), (3, 0))))
    assert streamed.group >= 8
    assert f"{streamed.group} examples together, waiting in memory" in streamed.why


def test_few_examples_may_all_wait_in_memory(source: Source) -> None:
    """Fewer than eight together are enough when there are no more."""
    amount = threshold(workload_of(source), (3, 0)) - 1
    many = plan_memory(workload_of(source), room(amount))
    few = plan_memory(workload_of(source, examples=3), room(amount))
    assert (many.waiting, few.waiting) == (DISK, DEVICE)
    assert few.group == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("amount", [1, 10**6, 12 * 10**6])
def test_a_refusal_names_what_would_be_enough(
    source: Source, dtype: str, gradient: bool, amount: int
) -> None:
    """Whatever is printed can be given as it stands; and it is no exaggeration."""
    for prompt in (100, 517, 2000, 3001):
        workload = workload_of(
            source, dtype=dtype, examples=16, prompt_tokens=prompt, gradient=gradient
        )
        with pytest.raises(UsageError, match="not even layer by layer") as caught:
            plan_memory(workload, room(amount))
        told = caught.value.details["expected"]
        assert told.startswith("at least ")
        enough = parse_bytes(told.removeprefix("at least "))
        assert plan_memory(workload, room(enough)).group >= 1
        with pytest.raises(UsageError):
            plan_memory(workload, room(int(enough * 0.85)))


def test_a_refusal_names_the_changes_that_would_do(source: Source) -> None:
    """Each of them, given to a run of the same memory, fits; what would not is not named."""
    workload = workload_of(source, prompt_tokens=3000, gradient=True)
    told = []
    for amount in range(15 * 10**6, 60 * 10**6, 10**6):
        try:
            plan_memory(workload, room(amount))
        except UsageError as error:
            step = error.details["next step"]
            assert step.startswith("use ") and step.endswith("--memory with more")
            changes = step.removeprefix("use ").split(" or ")[:-1]
            for change in changes:
                option, value = change.split(" ")[-2:]
                smaller = {
                    "--dtype": {"dtype": value},
                    "--length": {"prompt_tokens": int(value) if value.isdigit() else 0},
                    "as": {"gradient": False},
                }[option]
                plan_memory(replace(workload, **smaller), room(amount))
            told.append([change.split(" ")[0] for change in changes])
    assert ["--dtype", "--length"] in told
    assert ["--length"] in told


def test_a_spread_model_is_whole_or_refused(source: Source) -> None:
    workload = workload_of(source)
    least = threshold(workload, (4, 0))
    assert not plan_spread(workload, room(least)).streamed
    with pytest.raises(UsageError, match="even spread over all devices") as caught:
        plan_spread(workload, room(least - 10))
    enough = parse_bytes(caught.value.details["expected"].removeprefix("at least "))
    assert least <= enough <= least + 2**20
    assert "leave --device spread out" in caught.value.details["next step"]


def test_what_plans_and_gradients_keep(source: Source) -> None:
    workload = workload_of(source, prompt_tokens=1000)
    plans = switched_plans(FULL, Units(DEPTH), range(DEPTH))
    rows = widest_rows(plans, workload.spans, MASK)
    assert workload.waiting_bytes == rows * 128 * 4
    # Few at a time are far fewer than all of them.
    assert rows_held(plans, workload.spans, MASK, 1) < 4 * workload.spans.end < rows
    states = workload.spans.end - workload.spans.common
    back = replace(workload, gradient=True)
    assert back.waiting_bytes >= DEPTH * states * back.row_bytes
    assert back.waiting_bytes < DEPTH * workload.spans.end * back.row_bytes


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 128, "intermediate_size": 512},
        {"hidden_size": 128, "intermediate_size": 64},
        {"num_attention_heads": 8, "num_key_value_heads": 8},
        {"num_attention_heads": 8, "num_key_value_heads": 1},
    ],
    ids=str,
)
def test_what_a_layer_holds_for_the_way_back_is_counted(
    sizes: dict[str, int], tmp_path: Path
) -> None:
    """What autograd saves is most of the formula; the rest is there for moments."""
    folder, mask = make_model(tmp_path / "m", "qwen3", num_hidden_layers=2, **sizes), Mask(150)
    runner, example = resident(folder, mask, Placement("cpu", "float32")), example_of(1500, 2)
    workload = Workload(open_source(str(folder)), mask, "float32", 1, 1500, 2, gradient=True)
    weights = {p.untyped_storage().data_ptr() for p in runner._ends._model.parameters()}
    for layer in runner._modules.modules:  # type: ignore[union-attr]
        weights |= {p.untyped_storage().data_ptr() for p in layer.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        # Held, so that no other is made in the same place.
        storage = tensor.untyped_storage()
        saved.setdefault(storage.data_ptr(), storage)
        return tensor

    with saved_tensors_hooks(save, lambda tensor: tensor):
        runner.gate_gradients([example], ((0.5,),) * 2, ignore)
    held = sum(storage.nbytes() for place, storage in saved.items() if place not in weights)
    # Of the upper layer only the answer's rows run, which look at all keys.
    assert 0.6 < held / workload._back_bytes() < 1


def test_a_device_is_asked_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU nothing is taken off for what the process has in main memory."""
    monkeypatch.setattr(devices, "_free_in_main_memory", lambda: 64 * 2**30)
    found = {"cuda": DeviceMemory(20 * 2**30, 2**30), "cpu": DeviceMemory(64 * 2**30, 2**30)}
    monkeypatch.setattr(devices, "device_memory", found.__getitem__)
    whole = room_on("cuda", None)
    assert whole.free_bytes == int(21 * 2**30 * 0.9) - 2**30
    assert whole.host_bytes == int(64 * 2**30 * 0.9)
    assert (whole.told, whole.asked) == ("the 20.0 GiB that are free", False)
    assert room_on("cpu", None).host_bytes is None
    assert room_on("cuda", None, sharing=2).free_bytes < whole.free_bytes / 2
    little = room_on("cuda", 8 * 2**30)
    assert (little.told, little.asked) == ("8.0 GiB", True)
    assert little.free_bytes == int(8 * 2**30 * 0.9) - 2**30
    # More than there is cannot be had by asking.
    assert room_on("cuda", 80 * 2**30) == whole


def test_main_memory_is_the_container_s_where_that_is_less(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (machine,) = {device_memory("cpu").free_bytes // 2**50}
    assert machine == 0 < device_memory("cpu").own_bytes
    monkeypatch.setattr(devices, "_CGROUPS", tmp_path)
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("2000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 500000\nactive_file 7\n")
    assert device_memory("cpu").free_bytes == 1_500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert device_memory("cpu").free_bytes > 10**7


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


@pytest.mark.parametrize("way", ["whole", "streamed", "few", "host", "offloaded"])
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
        place = {"streamed": DEVICE, "few": DEVICE, "host": HOST, "offloaded": DISK}[way]
        plans = 2 if way == "few" else None
        memory_plan = MemoryPlan(True, 4, place, plans, 4096, f"chosen to be {way}")
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
    memory_plan = MemoryPlan(True, 4, DISK, None, 4096, "on disk")
    monkeypatch.setattr(memory, "plan_memory", lambda *_: memory_plan)
    options = ("--method", "nll-restore", "--work", tmp_path / "work", "--memory", "1GB")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ActivationOffload, "drop", killed)
        calibrate(*options, "--window", 12)
    assert list((tmp_path / "work").rglob("states-*"))
    found, expected = calibrate(*options, "--fresh"), unlimited("--method", "nll-restore")
    for left, right in zip(found["layers"], expected["layers"], strict=True):
        assert left["score"] == pytest.approx(right["score"], abs=1e-5)
