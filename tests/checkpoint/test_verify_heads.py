"""Checkpoints by KV heads are proved, and whatever is changed in their map of heads is noticed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from converter.checkpoint.format import HEADS_FILE, PLAN_FILE
from converter.model.mask import FULL, SLIDING
from tests.checkpoint.test_verify import RUNS, STATIC, verdict
from tests.checkpoint.test_verify_tampering import (
    CONFIG,
    FILES,
    PLAN_TRUSTED,
    edit,
    make_manifest_fit,
)
from tests.conftest import MIXED_FAMILIES, Folders, make_model, run_cli
from tests.hybrids import MASKS, load, random_ids
from tests.kv_heads import KINDS, checkpoint_by_heads, grouped_model, kinds_in, mask_of

Capture = pytest.CaptureFixture[str]
Kinds = tuple[str, ...]


@pytest.fixture(scope="module")
def by_heads(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A checkpoint under one of the masks; not to be written to."""
    root = tmp_path_factory.mktemp("by-heads")
    source = grouped_model(root / "model")
    return cache(
        lambda mask: checkpoint_by_heads(source, root / mask.replace(" ", "-"), mask_of(mask))
    )


@pytest.fixture
def copied(by_heads: Folders, tmp_path: Path) -> Path:
    return Path(shutil.copytree(by_heads("plain"), tmp_path / "copy"))


@pytest.mark.parametrize("mask", MASKS)
def test_what_convert_writes_is_proved(mask: str, by_heads: Folders, capsys: Capture) -> None:
    status, checks = verdict(capsys, by_heads(mask))
    assert status == 0, checks
    assert checks.keys() >= STATIC | {f"{run}, trusted" for run in RUNS}
    assert "refuses to load without trust" in checks


@pytest.mark.parametrize("family", ["minimax_m2", "qwen3_5_text", "gemma3_text"])
def test_families_are_proved(family: str, tmp_path: Path, capsys: Capture) -> None:
    """Of 2 KV heads; layers that no plan changes stay as they are."""
    source = make_model(tmp_path / family, family)
    kinds = kinds_in(family)
    out = checkpoint_by_heads(source, tmp_path / "out", mask_of("sinks"), kinds)
    status, checks = verdict(capsys, out)
    assert status == 0, checks
    config = json.loads((out / "config.json").read_text())
    assert config["hybrid"]["layer_types"] == list(kinds)
    if family not in MIXED_FAMILIES:
        assert config["layer_types"] == [FULL, SLIDING, FULL, FULL]


def test_a_plan_that_parts_no_layer_ships_without_the_file_that_does(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", "llama")
    out = checkpoint_by_heads(source, tmp_path / "out", mask_of("plain"), (FULL, SLIDING) * 2)
    assert not (out / HEADS_FILE).exists()
    assert "layer_types" not in json.loads((out / "config.json").read_text())["hybrid"]


@pytest.mark.parametrize("mask", ["plain", "sinks and full decode"])
def test_it_is_saved_and_loaded_and_compiled_whole(
    mask: str, by_heads: Folders, tmp_path: Path
) -> None:
    first, ids = load(by_heads(mask)), torch.tensor([random_ids(300)])
    first.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert again.config.hybrid["layer_types"] == list(KINDS)
    with torch.inference_mode():
        expected = first(ids).logits
        assert (again(ids).logits - expected).abs().max() < 1e-12
        compiled = torch.compile(again, backend="eager", fullgraph=True)
        assert (compiled(ids).logits - expected).abs().max() < 1e-12


def replaced(word: str) -> Kinds:
    """The kinds with another one in the first layer, of which KV heads 1 and 3 are full."""
    return (word, *KINDS[1:])


WORDS = {
    "a head swapped": "mixed_attention:1,2",
    "a head more": "mixed_attention:0,1,3",
    "a head less": "mixed_attention:3",
    "all heads": FULL,
    "no head": SLIDING,
}
NO_WORDS = ["mixed_attention:4", "mixed_attention:3,1", "mixed_attention:0,1,2,3"]
NO_WORDS += ["mixed_attention:", "mixed_attention", "mixed_attention:x"]


def change_config(folder: Path, kinds: Kinds) -> None:
    edit(folder / "config.json", lambda found: found["hybrid"].update(layer_types=list(kinds)))


def change_plan(folder: Path, kinds: Kinds) -> None:
    def change(plan: dict[str, Any]) -> None:
        full = [layer for layer, kind in enumerate(kinds) if kind == FULL]
        plan.update(layer_types=list(kinds), full_attention_layers=full)

    edit(folder / PLAN_FILE, change)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        *((change_config, word) for word in WORDS.values()),
        *((change_plan, word) for word in list(WORDS.values())[:2]),
    ],
)
def test_another_map_of_heads_is_caught_by_running_it(
    change: Callable[[Path, Kinds], None], word: str, copied: Path, capsys: Capture
) -> None:
    change(copied, replaced(word))
    make_manifest_fit(copied)
    _, failed = verdict(capsys, copied)
    assert FILES not in failed
    assert {CONFIG, PLAN_TRUSTED} <= failed.keys()
    assert failed[PLAN_TRUSTED]["value"] > 1000 * failed[PLAN_TRUSTED]["limit"]


def test_a_plan_and_config_that_were_changed_alike_are_caught_by_their_hashes(
    copied: Path, capsys: Capture
) -> None:
    change_config(copied, replaced("mixed_attention:0"))
    change_plan(copied, replaced("mixed_attention:0"))
    _, failed = verdict(capsys, copied)
    assert failed.keys() == {FILES}
    assert set(failed[FILES]["value"].split(", ")) == {"config.json", str(PLAN_FILE)}


def test_layer_types_that_the_plan_does_not_go_by_are_checked_too(
    copied: Path, capsys: Capture
) -> None:
    edit(copied / "config.json", lambda found: found.update(layer_types=[SLIDING] * 4))
    make_manifest_fit(copied)
    _, failed = verdict(capsys, copied)
    assert failed[CONFIG]["value"] == "layer_types"


@pytest.mark.parametrize("word", NO_WORDS[:2])
def test_what_is_no_word_does_not_run(word: str, copied: Path, capsys: Capture) -> None:
    change_config(copied, replaced(word))
    make_manifest_fit(copied)
    _, failed = verdict(capsys, copied)
    assert {CONFIG, "runs in a fresh process"} <= failed.keys()
    assert f"{word!r} is no kind of a layer" in failed["runs in a fresh process"]["value"]


@pytest.mark.parametrize("word", NO_WORDS)
def test_what_is_no_word_is_refused_in_a_plan(word: str, copied: Path, capsys: Capture) -> None:
    change_plan(copied, replaced(word))
    make_manifest_fit(copied)
    assert run_cli("verify", copied) == 2
    assert "plan.json" in capsys.readouterr().err
