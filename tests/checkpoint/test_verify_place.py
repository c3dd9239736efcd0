"""Where a proof runs and how long it takes: less memory or less time, but the same proof."""

from __future__ import annotations

import gc
import json
import subprocess
import weakref
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.sparse_model import QWEN3_4B, write_sparse_model
from converter.checkpoint.reader import open_checkpoint
from converter.checkpoint.verify import candidate, duration, place, request
from converter.checkpoint.verify.checks import verify
from converter.checkpoint.verify.place import Place, place_proof
from converter.checkpoint.verify.reference import Reference
from converter.checkpoint.verify.request import (
    CANDIDATE_CALLS,
    CANDIDATE_PASSES,
    make_probe,
)
from converter.common.errors import UsageError
from converter.common.units import human_time
from converter.model.mask import Mask
from converter.model.source import open_source
from tests.checkpoint.test_verify_tampering import edit, make_manifest_fit, window
from tests.conftest import FAMILIES, MORE_FAMILIES, Folders, make_model, run_cli
from tests.hybrids import WINDOW, convert, load, random_ids

Capture = pytest.CaptureFixture[str]

WHOLE = Place("cpu", "float32", "float32", False)
IN_TURN = Place("cpu", "float32", "bfloat16", True)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Models stored in bfloat16, as most are."""
    from safetensors.torch import load_file, save_file

    def made(family: str) -> Path:
        folder = make_model(tmp_path_factory.mktemp("half") / family, family, dtype="bfloat16")
        tensors = load_file(folder / "model.safetensors")
        rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return made


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_a_reference_without_room_for_its_layers_computes_the_same(
    family: str, halves: Folders, tmp_path: Path
) -> None:
    out = convert(halves(family), tmp_path / "out", "sinks")
    source, plan = open_checkpoint(out)
    ids = random_ids(60)
    whole, in_turn = (Reference(source, where, plan) for where in (WHOLE, IN_TURN))
    layers = in_turn._model.get_decoder().layers
    assert len(layers) == source.shape.layers
    for _ in range(2):
        assert all(weight.is_meta for layer in layers for weight in layer.parameters())
        found = in_turn.planned(ids, [5, 59], 50)
        assert found.equal(whole.planned(ids, [5, 59], 50))
        assert in_turn.original(ids, [59]).equal(whole.original(ids, [59]))
        assert not found.equal(in_turn.original(ids, [5, 59]))
    model = weakref.ref(in_turn._model)
    del in_turn, layers
    gc.collect()
    assert model() is None, "what transformers keeps of it must not keep its weights"


def test_a_candidate_without_room_for_its_layers_computes_the_same(
    halves: Folders, tmp_path: Path
) -> None:
    out = convert(halves("qwen3"), tmp_path / "out", "sinks")
    ids = torch.tensor([random_ids(60)])
    whole, in_turn = (load(out, dtype=torch.bfloat16) for _ in range(2))
    candidate.keep_layers_stored(in_turn, "cpu", torch.float64)
    layers = in_turn.get_decoder().layers
    with torch.inference_mode():
        for _ in range(2):
            assert {weight.dtype for weight in layers.parameters()} == {torch.bfloat16}
            assert in_turn(ids).logits.equal(whole.to(torch.float64)(ids).logits)
    assert in_turn.lm_head.weight is in_turn.get_input_embeddings().weight


def test_what_has_no_room_is_proved_all_the_same(
    halves: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = convert(halves("qwen3"), tmp_path / "out", "plain")
    monkeypatch.setattr(place, "free_bytes", lambda _: 0)
    report = verify(out, None)
    assert report.ok, report.failed
    edit(out / "config.json", window(1))
    make_manifest_fit(out)
    failed = verify(out, None).failed
    assert {f"plan past the window, {how}" for how in ("trusted", "untrusted")} <= {*failed}


@pytest.mark.parametrize(("free", "in_turn"), [(1 << 50, False), (16 << 30, True)])
def test_a_large_model_is_taken_whole_where_it_fits(
    free: int, in_turn: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sparse_model(tmp_path, QWEN3_4B, 2)
    monkeypatch.setattr(place, "free_bytes", lambda _: free)
    source = open_source(str(tmp_path))
    found = place_proof(source, 4200, "cpu", None)
    # On a CPU only what is taken in turn stays as it is stored.
    assert found == Place("cpu", "float32", "bfloat16" if in_turn else "float32", in_turn)
    small = place_proof(source, 4200, "cpu", "float64")
    assert (small.dtype, small.in_turn) == ("float64", in_turn)


def test_a_small_model_is_proved_in_float64_and_a_gpu_loads_what_is_stored(
    halves: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(halves("qwen3")))
    assert place_proof(source, 400, "cpu", None) == Place("cpu", "float64", "float64", False)
    monkeypatch.setattr(place, "free_bytes", lambda _: 1 << 50)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for asked, taken in {
        "auto": "cuda",
        "mps": "cuda",
        "spread": "cuda",
        "cuda:1": "cuda:1",
    }.items():
        assert place_proof(source, 400, asked, None) == Place(taken, "float64", "bfloat16", False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_bad_input(checkpoint: Folders, capsys: Capture) -> None:
    assert run_cli("verify", checkpoint("qwen3", "plain"), "--device", "cuda:3") == 2
    error = capsys.readouterr().err
    assert "this device cannot be used" in error and "cuda:3" in error
    with pytest.raises(UsageError, match="cannot be used"):
        place.free_bytes("cuda:nonsense")


def test_a_full_memory_is_no_verdict_about_the_checkpoint(
    checkpoint: Folders, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    said = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    ended = subprocess.CompletedProcess([], 1, "", f"Traceback\n{said}\n")
    monkeypatch.setattr(request.subprocess, "run", lambda *_, **__: ended)
    assert run_cli("verify", checkpoint("qwen3", "plain")) == 2
    error = capsys.readouterr().err
    assert "too little memory" in error and said in error and "--device cpu" in error


def test_what_a_candidate_runs_is_counted(checkpoint: Folders) -> None:
    """The estimate of the time rests on these counts, and the time itself on their being small."""
    model = load(checkpoint("qwen3", "sinks"))
    source, plan = open_checkpoint(checkpoint("qwen3", "sinks"))
    probe = make_probe(source.shape, replace(plan.mask, window_tokens=192, sink_tokens=0))
    assert len(probe.ids) == 400
    rows: list[int] = []
    layer = model.get_decoder().layers[0]
    layer.register_forward_pre_hook(lambda _, given: rows.append(given[0].shape[:2].numel()))
    candidate.run_all(model, json.loads(json.dumps(asdict(probe))), trusted=True)
    assert 0 <= CANDIDATE_PASSES * len(probe.ids) - sum(rows) < len(probe.ids) // 4
    assert CANDIDATE_CALLS - 2 <= len(rows) <= CANDIDATE_CALLS


def test_the_probe_crosses_the_window_and_is_no_longer_than_that_takes(sources: Any) -> None:
    shape = replace(open_source(str(sources["qwen3"])).shape, context_tokens=1 << 20)
    probe = make_probe(shape, Mask(2048, 4))
    assert 2 * 2052 < probe.prompt_tokens < len(probe.ids) < 2 * 2052 + 20
    # A part of the text is cut in the padded run, and what is left is longer than the window.
    assert len(probe.ids) - probe.padding_tokens > 1.4 * 2052
    assert {2046, 2047, 2048, 2049, 2050} <= {*probe.rows}


def test_the_time_is_told_beforehand_where_it_is_long(
    checkpoint: Folders, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    folder = checkpoint("llama", "sinks")
    source, plan = open_checkpoint(folder)
    probe = make_probe(source.shape, plan.mask)

    def expected(where: Place, candidates: int = 1) -> float | None:
        return duration.expected_seconds(source, plan, probe, where, candidates)

    assert expected(WHOLE) is None
    monkeypatch.setattr(duration, "_MOMENTS", 0)
    monkeypatch.setattr(duration, "_seconds", lambda run: run() is None or 10.0)
    layers = source.shape.layers
    assert expected(WHOLE) == layers * 10.0 * (3 + 1 + CANDIDATE_PASSES)
    assert expected(WHOLE, 2) == layers * 10.0 * (3 + 1 + 2 * CANDIDATE_PASSES)
    assert expected(IN_TURN) == layers * 10.0 * (8 + CANDIDATE_PASSES + CANDIDATE_CALLS)
    assert run_cli("verify", folder) == 0
    assert "proving takes about 7 minutes here (cpu)\n" in capsys.readouterr().err


def test_convert_proves_where_it_is_told_to_and_says_how_long_it_takes(
    sources: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(duration, "_MOMENTS", 0)
    monkeypatch.setattr(duration, "_seconds", lambda run: run() is None or 600.0)
    out = tmp_path / "out"
    command = ["convert", sources["llama"], out, "--layers", "1,2", "--window", WINDOW, "--verify"]
    assert run_cli(*command, "--device", "cuda:77") == 2
    assert "this device cannot be used" in capsys.readouterr().err
    assert not out.exists()
    assert run_cli(*command, "--device", "cpu") == 0
    assert "proving takes about 12.0 hours here (cpu)\n" in capsys.readouterr().err


def test_times_are_said_as_people_say_them() -> None:
    said = {0.2: "1 second", 40: "40 seconds", 720: "12 minutes", 12600: "3.5 hours"}
    assert {seconds: human_time(seconds) for seconds in said} == said
