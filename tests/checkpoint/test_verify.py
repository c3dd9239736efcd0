"""`hybridize verify` proves what is right, in a fresh process that has nothing of ours."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import FAMILIES, make_model, run_cli
from tests.hybrids import MASKS, convert

# What every verification must have looked at, whatever the form.
STATIC = {
    "files present",
    "no other files",
    "sizes and hashes",
    "config.json says the plan",
    "Python files are this version's",
    "needs nothing of ours",
}
RUNS = (
    "source up to the window",
    "plan past the window",
    "differs from the source past the window",
    "chunked prefill and cached decoding",
    "left padding",
    "batch",
    "cached generation is uncached generation",
    "generation is the reference's",
)
AGAINST = {
    "made from the given source's config",
    "weights are the source's",
    "tokenizer and licence are the source's",
}


def verdict(
    capsys: pytest.CaptureFixture[str], folder: Path, *options: object
) -> tuple[int, dict[str, Any]]:
    """Exit status and the checks that failed, by name; every check when all held."""
    capsys.readouterr()
    status = run_cli("verify", folder, "--json", *options)
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"ok", "checks", "sampled"}
    assert all(set(check) == {"name", "ok", "value", "limit"} for check in report["checks"])
    failed = [check for check in report["checks"] if not check["ok"]]
    assert report["ok"] == (not failed)
    assert status == (1 if failed else 0)
    return status, {check["name"]: check for check in failed or report["checks"]}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mask", [name for name in MASKS if name != "sinks and full decode"])
def test_what_convert_writes_is_verified(
    family: str, mask: str, checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    status, checks = verdict(capsys, checkpoint(family, mask))
    assert status == 0, checks
    native = mask == "plain"
    trusts = ("untrusted", "trusted") if native else ("trusted",)
    assert checks.keys() >= STATIC | {f"{run}, {trust}" for run in RUNS for trust in trusts}
    assert ("loads without trust" in checks) == native
    assert ("refuses to load without trust" in checks) == (not native)


def test_against_the_source_compares_weights_and_tokenizer(
    checkpoint: Callable[..., Path],
    sources: dict[str, Path],
    copy_of: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = checkpoint("llama", "plain")
    status, checks = verdict(capsys, folder, "--against", sources["llama"])
    assert status == 0 and checks.keys() >= AGAINST

    other = copy_of("llama")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    _, failed = verdict(capsys, folder, "--against", other)
    assert failed.keys() == {"tokenizer and licence are the source's"}
    assert failed.popitem()[1]["value"] == "tokenizer.json"


def test_against_another_model_of_the_same_shape_fails_in_bytes_and_in_logits(
    checkpoint: Callable[..., Path],
    copy_of: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    from safetensors.torch import load_file, save_file

    other = copy_of("llama")
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.3.self_attn.v_proj.weight"
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    _, failed = verdict(capsys, checkpoint("llama", "sinks"), "--against", other)
    assert "weights are the source's" in failed
    assert {"source up to the window, trusted", "plan past the window, trusted"} <= failed.keys()


@pytest.mark.parametrize("context", [2, 8, 13])
def test_a_context_shorter_than_what_is_decoded_is_enough(
    context: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_model(tmp_path / "short", "qwen3", max_position_embeddings=context)
    folder = convert(source, tmp_path / "out", "plain", window=max(1, context // 3))
    status, failed = verdict(capsys, folder)
    assert status == 0, failed


def test_float32_is_held_to_its_own_tolerance(
    checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    status, checks = verdict(capsys, checkpoint("qwen3", "plain"), "--dtype", "float32")
    assert status == 0, checks
    assert 0 < checks["plan past the window, trusted"]["value"] < 1e-4
    apart = checks["differs from the source past the window, trusted"]
    assert apart["value"] > 100 * apart["limit"]


def test_the_checkpoint_runs_offline_without_secrets_and_must_not_need_our_package(
    checkpoint: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The modeling file is replaced by one that writes down where it is run."""
    seen = tmp_path / "seen.json"
    folder = Path(shutil.copytree(checkpoint("qwen3", "sinks"), tmp_path / "spied"))
    code = folder / "modeling_hybrid.py"
    # transformers runs the file more than once, and imports what it imports before: the first time
    # tells, and our package is asked for in a way that is not seen in advance.
    spy = (
        "\nimport json, os, pathlib, sys\n"
        f"seen = pathlib.Path({str(seen)!r})\n"
        "told = {'environment': dict(os.environ), 'modules': [*sys.modules], 'pid': os.getpid()}\n"
        "seen.exists() or seen.write_text(json.dumps(told))\n"
        "__import__('converter')\n"
    )
    code.write_text(code.read_text() + spy)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    _, failed = verdict(capsys, folder, "--trust-remote-code")
    assert failed.keys() == {
        "sizes and hashes",
        "Python files are this version's",
        "needs nothing of ours",
    }
    assert failed["needs nothing of ours"]["value"].startswith("converter")
    found = json.loads(seen.read_text())
    assert found["pid"] != os.getpid()
    assert "hf_secret" not in found["environment"].values()
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    assert found["environment"].items() >= offline.items()
    assert not [name for name in found["modules"] if name.split(".")[0] == "converter"]


@pytest.mark.parametrize("folder", ["a source", "nothing", "a file"])
def test_what_is_no_checkpoint_is_bad_input(
    folder: str, sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {"a source": sources["qwen3"], "nothing": tmp_path / "none", "a file": tmp_path / "f"}
    (tmp_path / "f").write_text("{}")
    assert run_cli("verify", paths[folder]) == 2
    error = capsys.readouterr().err
    assert "not a checkpoint written by hybridize" in error
    assert "Traceback" not in error
