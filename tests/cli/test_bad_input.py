"""Bad input at the command line: one clear message, exit status 2, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest

from converter.calibration.scores import ExampleScores, Scores
from converter.calibration.selectors import MEASURING
from converter.cli import hybridize
from converter.common.files import write_json
from converter.model.families import FAMILIES
from converter.model.mask import Mask
from converter.model.source import open_source
from converter.recipes import recipe_names
from tests.conftest import CONTEXT, LAYERS, make_tokenizer, run_cli

CopyOf = Callable[[str], Path]
Refused = Callable[..., str]

SHARD = "model-00002-of-00005.safetensors"
INDEX = "model.safetensors.index.json"


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything in a folder, hidden or not, with what changes when it is written to."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(folder))] = (status.st_size, status.st_mtime_ns)
    return found


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must be refused; its message.

    It must print one message with all of `says`, no result, and leave the disk as it was.
    """

    def run(*arguments: object, says: tuple[object, ...] = ()) -> str:
        before = tree(tmp_path)
        capsys.readouterr()
        status = run_cli(*arguments)
        out, err = capsys.readouterr()
        assert status == 2, f"status {status}: {out}{err}"
        assert out == ""
        assert "Traceback" not in err
        assert err.startswith("error: ")
        assert sum(line.startswith(("error:", "Error:")) for line in err.splitlines()) == 1
        for words in says:
            assert str(words) in err
        assert tree(tmp_path) == before
        return err

    return run


@pytest.fixture
def misused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that click itself must refuse; its message."""

    def run(*arguments: object, says: tuple[object, ...] = ()) -> str:
        before = tree(tmp_path)
        capsys.readouterr()
        status = run_cli(*arguments)
        out, err = capsys.readouterr()
        assert (status, out) == (2, "")
        assert sum(line.startswith("Error: ") for line in err.splitlines()) == 1
        assert "Traceback" not in err
        for words in says:
            assert str(words) in err
        assert tree(tmp_path) == before
        return err

    return run


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    value = json.loads(path.read_text()) | changes
    removed = {key for key, part in changes.items() if part is None}
    path.write_text(json.dumps({key: value[key] for key in value if key not in removed}))


def commands_on(source: Path, tmp_path: Path) -> list[list[object]]:
    """Every command that opens a source."""
    return [
        ["inspect", source],
        ["plan", source, "--layers", "1", "--out", tmp_path / "plan.json"],
        ["calibrate", source, "--out", tmp_path / "scores.json"],
        ["convert", source, tmp_path / "out", "--layers", "1"],
        ["convert", source, tmp_path / "out"],
    ]


# --- sources that are no models ---------------------------------------------------------------


def a_missing_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def an_empty_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


def a_config_that_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "qwen3",')


def a_config_that_is_not_text(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe{}")


def a_config_that_is_a_list(folder: Path) -> None:
    (folder / "config.json").write_text('["qwen3"]')


def a_config_with_not_a_number(folder: Path) -> None:
    edit_json(folder / "config.json", rms_norm_eps=float("nan"))


def a_config_with_an_endless_number(folder: Path) -> None:
    (folder / "config.json").write_text('{"num_hidden_layers": ' + "9" * 5000 + "}")


def a_config_nested_without_end(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


def a_config_without_num_hidden_layers(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=None)


def a_config_with_a_size_that_is_text(folder: Path) -> None:
    edit_json(folder / "config.json", hidden_size="64")


def a_config_with_no_heads(folder: Path) -> None:
    edit_json(folder / "config.json", num_attention_heads=0)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def an_unsupported_family(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="mamba2")


def no_model_type(folder: Path) -> None:
    edit_json(folder / "config.json", model_type=None)


def a_model_type_that_is_a_list(folder: Path) -> None:
    edit_json(folder / "config.json", model_type=["qwen2"])


def pickled_weights(folder: Path) -> None:
    for shard in folder.glob("*.safetensors*"):
        shard.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def no_weights(folder: Path) -> None:
    for shard in folder.glob("*.safetensors*"):
        shard.unlink()


def a_truncated_shard(folder: Path) -> None:
    os.truncate(folder / SHARD, 1000)


def a_shard_short_of_its_last_byte(folder: Path) -> None:
    os.truncate(folder / SHARD, (folder / SHARD).stat().st_size - 1)


def an_empty_shard(folder: Path) -> None:
    (folder / SHARD).write_bytes(b"")


def a_shard_that_is_a_git_lfs_pointer(folder: Path) -> None:
    (folder / SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def a_missing_shard(folder: Path) -> None:
    (folder / SHARD).unlink()


def a_shard_that_is_a_folder(folder: Path) -> None:
    (folder / SHARD).unlink()
    (folder / SHARD).mkdir()


def index_names(folder: Path, name: str) -> None:
    listed = json.loads((folder / INDEX).read_text())["weight_map"]
    edit_json(folder / INDEX, weight_map=listed | {"model.norm.weight": name})


def an_index_to_the_parent(folder: Path) -> None:
    index_names(folder, "../secret.safetensors")


def an_index_to_the_root(folder: Path) -> None:
    index_names(folder, "/etc/secret.safetensors")


def an_index_with_a_backslash(folder: Path) -> None:
    index_names(folder, "..\\secret.safetensors")


def an_index_to_another_kind_of_file(folder: Path) -> None:
    index_names(folder, "tokenizer.json")


def an_index_that_is_not_json(folder: Path) -> None:
    (folder / INDEX).write_text("weights")


def an_index_without_weight_map(folder: Path) -> None:
    (folder / INDEX).write_text('{"metadata": {}}')


def an_index_of_numbers(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {"model.norm.weight": 1}}')


def a_shard_linked_from_elsewhere(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere.safetensors"
    (folder / SHARD).rename(elsewhere)
    (folder / SHARD).symlink_to(elsewhere)


def a_shard_linked_to_itself(folder: Path) -> None:
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to(SHARD)


def an_index_of_a_tensor_too_many(folder: Path) -> None:
    index_names(folder, SHARD)
    listed = json.loads((folder / INDEX).read_text())["weight_map"]
    edit_json(folder / INDEX, weight_map=listed | {"model.extra.weight": SHARD})


def an_index_with_a_tensor_in_the_wrong_shard(folder: Path) -> None:
    listed = json.loads((folder / INDEX).read_text())["weight_map"]
    other = next(name for name in sorted(set(listed.values())) if name != listed["lm_head.weight"])
    edit_json(folder / INDEX, weight_map=listed | {"lm_head.weight": other})


def a_tensor_in_two_shards(folder: Path) -> None:
    shutil.copy(folder / SHARD, folder / "model-copy.safetensors")
    listed = json.loads((folder / INDEX).read_text())["weight_map"]
    moved = next(name for name, shard in listed.items() if shard == SHARD)
    edit_json(folder / INDEX, weight_map=listed | {moved: "model-copy.safetensors"})


def another_hidden_size_than_the_weights(folder: Path) -> None:
    edit_json(folder / "config.json", hidden_size=128)


def more_layers_than_the_weights(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=LAYERS + 1)


def quantized_weights(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def quantized_weights_told_oddly(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config="4bit")


def a_hybrid(folder: Path) -> None:
    edit_json(folder / "config.json", hybrid={"format_version": 2})


NOT_MODELS: tuple[tuple[Callable[[Path], None], tuple[str, ...]], ...] = (
    (a_missing_folder, ("no such model", "expected: a folder with config.json")),
    (an_empty_folder, ("not a model folder", "a folder with config.json")),
    (a_file, ("not a model folder", "a folder with config.json")),
    (no_config, ("not a model folder", "config.json")),
    (a_config_that_is_not_json, ("not valid JSON", "config.json", "line 1")),
    (a_config_that_is_not_text, ("cannot be read", "config.json", "UTF-8")),
    (a_config_that_is_a_list, ("does not hold a JSON object", "config.json", "list")),
    (a_config_with_not_a_number, ("not valid JSON", "config.json", "NaN")),
    (a_config_with_an_endless_number, ("not valid JSON", "config.json")),
    (a_config_nested_without_end, ("not valid JSON", "config.json")),
    (a_config_without_num_hidden_layers, ("num_hidden_layers", "positive integer", "nothing")),
    (a_config_with_a_size_that_is_text, ("hidden_size", "positive integer", "got: '64'")),
    (a_config_with_no_heads, ("num_attention_heads", "positive integer", "got: 0")),
    (an_unsupported_family, ("not supported", "'mamba2'", *FAMILIES)),
    (no_model_type, ("not supported", "got: None", "qwen3")),
    (a_model_type_that_is_a_list, ("not supported", "['qwen2']", "qwen3")),
    (pickled_weights, ("pickled", "pytorch_model.bin", "*.safetensors")),
    (no_weights, ("holds no weights", "model.safetensors")),
    (a_truncated_shard, ("truncated", SHARD, "1,000 bytes", "download it again")),
    (a_shard_short_of_its_last_byte, ("truncated", SHARD, "download it again")),
    (an_empty_shard, ("truncated", SHARD, "0 bytes")),
    (a_shard_that_is_a_git_lfs_pointer, ("truncated or damaged", SHARD)),
    (a_missing_shard, ("missing", SHARD, "download it again")),
    (a_shard_that_is_a_folder, ("missing", SHARD)),
    (an_index_to_the_parent, ("points at something", INDEX, "'../secret.safetensors'")),
    (an_index_to_the_root, ("points at something", INDEX, "'/etc/secret.safetensors'")),
    (an_index_with_a_backslash, ("points at something", INDEX, "secret.safetensors'")),
    (an_index_to_another_kind_of_file, ("points at something", INDEX, "'tokenizer.json'")),
    (an_index_that_is_not_json, ("not valid JSON", INDEX)),
    (an_index_without_weight_map, ("no weight_map", INDEX)),
    (an_index_of_numbers, ("no weight_map", INDEX)),
    (a_shard_linked_from_elsewhere, ("symbolic link", SHARD, "elsewhere.safetensors")),
    (a_shard_linked_to_itself, ("symbolic link", SHARD)),
    (an_index_of_a_tensor_too_many, ("disagree about tensor", INDEX, "no shard")),
    (an_index_with_a_tensor_in_the_wrong_shard, ("disagree", "'lm_head.weight'", INDEX)),
    (a_tensor_in_two_shards, ("stands in two shards", SHARD, "model-copy.safetensors")),
    (another_hidden_size_than_the_weights, ("do not fit", "[320, 128]", "[320, 64]")),
    (more_layers_than_the_weights, ("do not fit", "model.layers.4.", "no such tensor")),
    (quantized_weights, ("quantized", "config.json", "gptq", "unquantized")),
    (quantized_weights_told_oddly, ("quantized", "config.json", "4bit", "unquantized")),
    (a_hybrid, ("a hybrid checkpoint already", "config.json", "retarget")),
)


@pytest.mark.parametrize(
    ("damage", "says"), NOT_MODELS, ids=[damage.__name__ for damage, _ in NOT_MODELS]
)
def test_every_command_refuses(
    damage: Callable[[Path], None],
    says: tuple[str, ...],
    copy_of: CopyOf,
    refused: Refused,
    tmp_path: Path,
) -> None:
    folder = copy_of("qwen2")
    damage(folder)
    for command in commands_on(folder, tmp_path):
        refused(*command, says=says)


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("mistral", {"sliding_window": 128}, "window of 128 tokens"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64}, "window of 64 tokens"),
        ("qwen3", {"layer_types": ["sliding_attention"] * LAYERS}, "layer_types"),
    ],
)
def test_a_source_that_slides_already_is_refused(
    family: str,
    changes: dict[str, Any],
    says: str,
    copy_of: CopyOf,
    refused: Refused,
    tmp_path: Path,
) -> None:
    folder = copy_of(family)
    edit_json(folder / "config.json", **changes)
    refused(
        "convert", folder, tmp_path / "out", says=("cannot be converted", "full attention", says)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": 5},
        {"sliding_window": "128"},
        {"rope_parameters": [1]},
        {"rope_parameters": "linear"},
    ],
    ids=str,
)
def test_a_config_key_of_the_wrong_type_is_refused(
    changes: dict[str, Any], copy_of: CopyOf, refused: Refused, tmp_path: Path
) -> None:
    folder = copy_of("llama")
    edit_json(folder / "config.json", **changes)
    out = tmp_path / "out"
    refused("convert", folder, out, "--layers", "1", says=("config.json", *changes))


def test_a_window_as_long_as_the_context_is_full_attention(copy_of: CopyOf) -> None:
    folder = copy_of("mistral")
    edit_json(folder / "config.json", sliding_window=CONTEXT)
    assert run_cli("inspect", folder) == 0


def test_a_hub_name_that_is_not_cached_is_refused_offline(refused: Refused) -> None:
    refused("inspect", "nobody/nothing", "--offline", says=("nobody/nothing", "--offline"))


@pytest.mark.parametrize("name", ["no-such-folder", "a/b/c", "./nothing", "x" * 5000, "a b/c d"])
def test_a_name_that_is_neither_folder_nor_hub_id_is_refused(name: str, refused: Refused) -> None:
    refused("inspect", name, "--offline", says=(name[:20],))


def test_a_revision_of_a_local_folder_is_refused(
    sources: dict[str, Path], refused: Refused
) -> None:
    refused("inspect", sources["qwen3"], "--revision", "main", says=("--revision", "local path"))


# --- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--budget", "5"], ("budget asks for more", "--budget", "0 to 4", "got: 5")),
        (["--budget", "0/4"], ("out of range", "--budget", "above 0", "got: 0/4")),
        (["--budget", "3/2"], ("out of range", "--budget", "at most 1", "got: 3/2")),
        (["--budget", "1/0"], ("cannot be read", "--budget", "'1/0'", "1/4")),
        (["--budget", "-1"], ("cannot be read", "--budget", "'-1'")),
        (["--budget", "some"], ("cannot be read", "--budget", "'some'", "a count")),
        (["--budget", ""], ("cannot be read", "--budget", "''")),
        (["--budget", "9" * 5000], ("budget", "--budget")),
        (["--budget", "kv:2Gib@4k"], ("cannot be read", "'kv:2Gib@4k'", "kv:2GiB@128k")),
        (["--budget", "kv:1GB@513"], ("longer than the model's", "at most 512", "got: 513")),
        (["--budget", "kv:1B"], ("even when every layer slides", "at least kv:49152B (48.0 KiB)")),
        (
            ["--budget", "kv:786431B", "--full-decode"],
            ("every layer keeps its whole KV cache", "at least kv:786432B", "--full-decode"),
        ),
        (["--budget", "nll:-1"], ("out of range", "at least 0 nats", "got: nll:-1")),
        (["--budget", "nll:nan"], ("out of range", "finite", "got: nll:nan")),
        (["--method", "guess"], ("--method", "nll-restore", "got 'guess'")),
        (["--method", "serch"], ("--method", "got 'serch'", "did you mean search?")),
        (["--method", "nll-restore,kll"], ("--method", "got 'kll'", "did you mean kl?")),
        (["--method", ""], ("--method", "nll-restore", "got 'nothing'")),
        (["--method", "nll-restore,"], ("--method", "nll-restore", "got 'nothing'")),
        (["--method", "kl,,greedy"], ("--method", "nll-restore", "got 'nothing'")),
        (["--method", "kl, greedy"], ("--method", "got ' greedy'", "did you mean greedy?")),
        (["--method", "greedy,kl,greedy"], ("given twice", "'greedy,kl,greedy'")),
        (["--method", "best,greedy"], ("best and all stand alone", "'best,greedy'")),
        (["--method", "greedy,all"], ("best and all stand alone", "'greedy,all'")),
        (["--method", "periodic,periodic"], ("given twice", "'periodic,periodic'")),
        (["--validation", "0"], ("--validation", "at least 1", "got 0")),
        (["--layers", "4"], ("no such layer", "--layers", "0 to 3", "got: 4")),
        (["--layers", "-1"], ("no such layer", "--layers", "0 to 3", "got: -1")),
        (["--layers", "1,1"], ("named twice", "--layers", "[1, 1]")),
        (["--layers", "1,two"], ("--layers", "layer numbers such as 3,7,11", "'1,two'")),
        (["--layers", "1,,2"], ("--layers", "layer numbers", "'1,,2'")),
        (["--layers", "1", "--budget", "1"], ("layers and budget", "one of the two")),
        (["--window", "0"], ("--window", "at least 1", "got: 0")),
        (["--window", "-5"], ("--window", "at least 1", "got: -5")),
        (["--window", "512"], ("--window", "below 512 tokens", "got: 512", "smaller")),
        (["--window", "500", "--sinks", "12"], ("--window", "window + sinks", "got: 512")),
        (["--sinks", "-1"], ("--sinks", "0 or more", "got: -1")),
        (["--method", "periodic", "--offset", "4"], ("--offset", "0 to 3", "got: 4")),
        (["--method", "periodic", "--offset", "-1"], ("--offset", "at least 0", "got -1")),
        (["--method", "periodic", "--budget", "2", "--offset", "2"], ("--offset", "0 to 1")),
        (["--target", "llama.cpp", "--sinks", "4"], ("llama.cpp", "--target", "leave out --sinks")),
        (["--target", "vllm", "--full-decode"], ("vLLM", "--target", "leave out --sinks and --fu")),
        (["--target", "mlx", "--full-decode"], ("mlx-lm", "refused", "--target")),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_setting_that_makes_no_sense_is_refused(
    options: list[str],
    says: tuple[str, ...],
    sources: dict[str, Path],
    refused: Refused,
    tmp_path: Path,
) -> None:
    """Before anything is measured, by each command that takes the setting."""
    source = sources["qwen3"]
    refused("convert", source, tmp_path / "out", *options, says=says)
    refused("plan", source, "--out", tmp_path / "plan.json", *options, says=says)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--window", "512"], ("--window", "below 512 tokens")),
        (["--samples", "0"], ("--samples", "at least 1", "got 0")),
        (["--min-answer", "0"], ("--min-answer", "at least 1", "got 0")),
        (["--max-answer", "0"], ("--max-answer", "at least 1", "got 0")),
        (["--seed", "-1"], ("--seed", "at least 0", "got -1")),
        (["--length", "512"], ("--length", "below 512", "got: 512")),
        (["--length", "0"], ("--length", "at least 1", "got 0")),
        (["--length", "20"], ("length cannot hold", "at least", "longer examples")),
        (["--device", "tpu"], ("device", "--device", "tpu", "cpu, cuda or cuda:0")),
        (["--device", "meta"], ("device", "--device", "meta", "cpu, cuda or cuda:0")),
        (["--device", ""], ("device", "--device", "cpu, cuda or cuda:0")),
        (["--device", "spread", "--memory", "1GB"], ("--device spread", "also --memory")),
        (["--memory", "lots"], ("--memory", "4GB or 2GiB", "'lots'")),
        (["--memory", "0GB"], ("--memory", "4GB or 2GiB", "'0GB'")),
        (["--budget", "9"], ("budget asks for more", "0 to 4", "got: 9")),
        (["--budget", "kv:1B"], ("even when every layer slides", "at least kv:49152B")),
        (["--method", "periodic"], ("measures nothing", "--method", ", ".join(MEASURING))),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_setting_that_cannot_be_measured_with_is_refused(
    options: list[str],
    says: tuple[str, ...],
    sources: dict[str, Path],
    refused: Refused,
    tmp_path: Path,
) -> None:
    refused("calibrate", sources["qwen3"], "--out", tmp_path / "scores.json", *options, says=says)


def test_spreading_without_accelerate_says_what_to_install(
    sources: dict[str, Path],
    refused: Refused,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("converter.inference.load.find_spec", lambda _name: None)
    refused(
        *("calibrate", sources["qwen3"], "--out", tmp_path / "scores.json"),
        *("--device", "spread", "--length", "400"),
        says=("accelerate", "--device spread", "pip install 'hybridize[spread]'"),
    )


def test_too_little_memory_is_refused_with_how_much_is_enough(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = data_file(tmp_path, "rows.jsonl", json.dumps({"prompt": LONG, "answer": "x"}))
    out = tmp_path / "scores.json"
    command = ("calibrate", sources["qwen3"], "--out", out, "--data", data, "-q")
    command += ("--method", "nll-restore")
    assert run_cli(*command, "--memory", "1KB") == 2
    printed, err = capsys.readouterr()
    assert printed == ""
    assert err.startswith("error: the model cannot be scored in so little memory")
    for words in ("--memory", "at least", "MiB", "--length"):
        assert words in err
    assert not out.exists()


def test_settings_that_are_wrong_are_all_named_at_once(
    sources: dict[str, Path], refused: Refused, tmp_path: Path
) -> None:
    refused(
        *("convert", sources["qwen3"], tmp_path / "out"),
        *("--samples", "0", "--seed", "-3", "--layers", "x", "--holdout", "-1"),
        says=("--samples", "--seed", "--layers", "--holdout", "got -3", "'x'"),
    )


def test_every_offset_of_named_layers_is_refused(
    sources: dict[str, Path], refused: Refused
) -> None:
    refused("plan", sources["qwen3"], "--layers", "1", "--every-offset", says=("--every-offset",))


# --- plans ------------------------------------------------------------------------------------


@pytest.fixture
def plan_file(sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A good plan for the Qwen3 model."""
    path = tmp_path / "good-plan.json"
    assert (
        run_cli("plan", sources["qwen3"], "--layers", "0,2", "--window", "16", "--out", path) == 0
    )
    capsys.readouterr()
    return path


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"layer_types": ["full_attention"] * 3, "full_attention_layers": [0, 1, 2]},
            ("another depth", "--plan", "4 layers", "got: 3"),
        ),
        ({"full_attention_layers": [1]}, ("contradicts itself", "[0, 2]", "[1]")),
        ({"full_attention_layers": None}, ("contradicts itself", "None")),
        ({"layer_types": None}, ("layer_types", "None")),
        ({"layer_types": "full_attention"}, ("layer_types", "'full_attention'")),
        ({"layer_types": [["full_attention"]] * 4}, ("layer_types", "full_attention")),
        ({"layer_types": ["chunked_attention"] * 4}, ("layer_types", "chunked_attention")),
        ({"layer_types": []}, ("layer_types", "[]")),
        ({"ranking": [0, 1]}, ("ranking", "every index once", "[0, 1]")),
        ({"ranking": [0, 1, 2, "3"]}, ("ranking", "every index once", "'3'")),
        ({"ranking": 3}, ("ranking", "got: 3")),
        ({"mask": None}, ("not a mask", "window_tokens, sink_tokens, full_attention_decode")),
        ({"mask": {"window_tokens": 16}}, ("not a mask", "window_tokens")),
        (
            {"mask": {"window_tokens": 0, "sink_tokens": 0, "full_attention_decode": False}},
            ("window is too small",),
        ),
        (
            {"mask": {"window_tokens": 1.5, "sink_tokens": 0, "full_attention_decode": False}},
            ("window_tokens", "expected: int", "1.5"),
        ),
        (
            {"mask": {"window_tokens": 600, "sink_tokens": 0, "full_attention_decode": False}},
            ("window", "below 512 tokens", "got: 600"),
        ),
        ({"format_version": 2}, ("version", "format_version 1", "got: 2")),
        ({"method": None}, ("method", "a string")),
        ({"source": 7}, ("source", "a string", "got: 7")),
        ({"budget": 4}, ("budget", "a string", "got: 4")),
        ({"revision": ["main"]}, ("revision", "a string", "['main']")),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else "",
)
def test_a_plan_that_cannot_be_used_is_refused(
    changes: dict[str, Any],
    says: tuple[str, ...],
    plan_file: Path,
    sources: dict[str, Path],
    refused: Refused,
    tmp_path: Path,
) -> None:
    edit_json(plan_file, **changes)
    refused("convert", sources["qwen3"], tmp_path / "out", "--plan", plan_file, says=says)


@pytest.mark.parametrize("option", ["--plan", "--scores"])
def test_a_plan_or_scores_file_that_is_no_json_is_refused(
    option: str, sources: dict[str, Path], refused: Refused, tmp_path: Path
) -> None:
    convert = ("convert", sources["qwen3"], tmp_path / "out", option)
    refused(*convert, tmp_path / "none.json", says=("none.json", "No such file", "next step"))
    (tmp_path / "bad.json").write_text("nonsense")
    refused(*convert, tmp_path / "bad.json", says=("not valid JSON", "bad.json", "next step"))
    (tmp_path / "list.json").write_text("[]")
    refused(*convert, tmp_path / "list.json", says=("JSON object", "list.json", "got: list"))
    refused(*convert, tmp_path, says=("cannot be read", tmp_path, "directory"))


@pytest.mark.parametrize(
    "options",
    [
        ["--budget", "1/2"],
        ["--layers", "1"],
        ["--window", "8"],
        ["--sinks", "2"],
        ["--full-decode"],
        ["--method", "periodic"],
        ["--offset", "1"],
        ["--scores", "scores.json"],
    ],
    ids=" ".join,
)
def test_a_plan_leaves_nothing_to_decide(
    options: list[str],
    plan_file: Path,
    sources: dict[str, Path],
    refused: Refused,
    tmp_path: Path,
) -> None:
    refused(
        *("convert", sources["qwen3"], tmp_path / "out", "--plan", plan_file, *options),
        says=("--plan has decided already", options[0]),
    )


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        ("deep", ("--profile", "NAME=FILE", "deep")),
        ("=plan.json", ("--profile", "NAME=FILE", "=plan.json")),
        ("deep=", ("--profile", "NAME=FILE", "deep=")),
        ("deep=none.json", ("cannot be read", "none.json")),
    ],
)
def test_a_profile_that_cannot_be_read_is_refused(
    profile: str,
    says: tuple[str, ...],
    sources: dict[str, Path],
    refused: Refused,
    tmp_path: Path,
) -> None:
    convert = ("convert", sources["qwen3"], tmp_path / "out", "--layers", "1")
    refused(*convert, "--profile", profile, says=says)


def test_a_profile_under_another_mask_is_refused(
    plan_file: Path, sources: dict[str, Path], refused: Refused, tmp_path: Path
) -> None:
    convert = ("convert", sources["qwen3"], tmp_path / "out", "--profile", f"deep={plan_file}")
    refused(
        *(*convert, "--layers", "1", "--window", "32"),
        says=("another mask", "--profile deep", "expected: window 32", "got: window 16"),
    )


def test_a_given_plan_is_held_against_the_target(
    plan_file: Path, sources: dict[str, Path], refused: Refused, tmp_path: Path
) -> None:
    mask = json.loads(plan_file.read_text())["mask"]
    edit_json(plan_file, mask=mask | {"full_attention_decode": True})
    refused(
        *("convert", sources["qwen3"], tmp_path / "out", "--plan", plan_file, "--target", "mlx"),
        says=("mlx-lm", "--target"),
    )


# --- scores -----------------------------------------------------------------------------------


def scores_of(source: Path, mask: Mask) -> Scores:
    """Scores as a calibration of a model would write them."""
    example = ExampleScores("pair", 100, 4, 1.0, 3.0, (0.5, 1.5, 1.0, 0.1))
    return Scores(
        method="nll-restore",
        mask=mask,
        examples=(example, replace(example, sliding=3.5)),
        layer_forwards=48,
        fingerprint={"source": open_source(str(source)).fingerprint},
        order=(1, 2, 0, 3),
    )


@pytest.fixture
def scores_file(sources: dict[str, Path], tmp_path: Path) -> Path:
    """Good scores of the Qwen3 model under a window of 16."""
    path = tmp_path / "good-scores.json"
    write_json(path, scores_of(sources["qwen3"], Mask(16)).to_json())
    return path


def deciding(source: Path, scores: Path, tmp_path: Path) -> list[list[object]]:
    """The commands that decide from scores."""
    return [
        ["plan", source, "--scores", scores, "--out", tmp_path / "plan.json"],
        ["convert", source, tmp_path / "out", "--scores", scores],
    ]


def test_good_scores_are_accepted(
    scores_file: Path, sources: dict[str, Path], tmp_path: Path
) -> None:
    for command in deciding(sources["qwen3"], scores_file, tmp_path):
        assert run_cli(*command) == 0


def test_scores_of_another_model_are_refused(
    scores_file: Path, sources: dict[str, Path], refused: Refused, tmp_path: Path
) -> None:
    for command in deciding(sources["llama"], scores_file, tmp_path):
        refused(*command, says=("another model", "--scores", "fingerprint", "hybridize calibrate"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--window", "8"], ("another mask", "--window", "expected: 16", "got: 8")),
        (["--sinks", "2"], ("another mask", "--sinks", "expected: 0", "got: 2")),
        (["--full-decode"], ("another mask", "--full-decode", "expected: False", "got: True")),
        (["--budget", "9"], ("budget asks for more", "0 to 4", "got: 9")),
        (["--method", "nll-remove"], ("nll-restore", "nll-remove", "--method")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_contradict_the_scores_are_refused(
    options: list[str],
    says: tuple[str, ...],
    scores_file: Path,
    sources: dict[str, Path],
    refused: Refused,
    tmp_path: Path,
) -> None:
    for command in deciding(sources["qwen3"], scores_file, tmp_path):
        refused(*command, *options, says=says)


EXAMPLE = {"kind": "pair", "prompt_tokens": 9, "answer_tokens": 1, "full": 1.0, "sliding": 2.0}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format_version": 7}, ("format_version 3", "format_version 7")),
        ({"format_version": 2}, ("format_version 3", "format_version 2")),
        ({"method": ["nll-restore"]}, ("and a method", "method ['nll-restore']")),
        ({"unit": "\x1b[31m"}, ("damaged", "unit")),
        ({"mask": None}, ("damaged", "mask")),
        ({"mask": [16]}, ("damaged", "mask")),
        ({"per_example": None}, ("damaged", "per_example")),
        ({"per_example": []}, ("damaged",)),
        ({"per_example": [4]}, ("damaged",)),
        ({"per_example": [EXAMPLE]}, ("damaged", "scores")),
        ({"per_example": [EXAMPLE | {"scores": [1.0] * 4, "seconds": 1.0}]}, ("seconds",)),
        ({"per_example": [EXAMPLE | {"scores": 1.0}]}, ("damaged",)),
        ({"per_example": [EXAMPLE | {"scores": ["1"] * 4}]}, ("damaged", "not a finite number")),
        ({"per_example": [EXAMPLE | {"scores": [10**400] * 4}]}, ("damaged",)),
        (
            {"per_example": [EXAMPLE | {"scores": [1.0] * 3}], "order": [2, 0, 1]},
            ("another depth", "4 layers", "3"),
        ),
        ({"per_example": [EXAMPLE | {"scores": [1.0] * 3}]}, ("damaged", "not an order of 3")),
        ({"contest": {"keep": 1, "entries": []}}, ("damaged", "original")),
        ({"profiles": {"pair": [0, 1, 2]}}, ("damaged", "not an order of 4")),
        ({"per_example": [EXAMPLE | {"scores": [1.0, None, 1.0, 1.0]}]}, ("layer 1 has no score",)),
        ({"layer_forwards": "many"}, ("damaged", "many")),
        ({"fingerprint": "abc"}, ("damaged",)),
        ({"fingerprint": None}, ("damaged", "fingerprint")),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_a_damaged_scores_file_is_refused(
    changes: dict[str, Any],
    says: tuple[str, ...],
    scores_file: Path,
    sources: dict[str, Path],
    refused: Refused,
    tmp_path: Path,
) -> None:
    edit_json(scores_file, **changes)
    for command in deciding(sources["qwen3"], scores_file, tmp_path):
        refused(*command, says=says)


def test_a_plan_by_score_without_scores_says_how_to_get_them(
    sources: dict[str, Path], refused: Refused, tmp_path: Path
) -> None:
    refused(
        *("plan", sources["qwen3"], "--budget", "1/4", "--out", tmp_path / "plan.json"),
        says=("needs scores", "--scores", "hybridize calibrate", "--method periodic"),
    )


# --- calibration data -------------------------------------------------------------------------

LONG = "word " * 40


def data_file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.jsonl", None, ("no such data", "none.jsonl", "'recall'", ".jsonl")),
        ("rows.csv", "a,b\n", ("cannot be read", "rows.csv", ".jsonl, .parquet or .txt")),
        ("rows", "{}\n", ("cannot be read", "rows", ".jsonl, .parquet or .txt")),
        (
            "rows.jsonl",
            json.dumps({"prompt": LONG, "answer": "x"}) + "\n\n{'prompt'\n",
            ("not JSON", "rows.jsonl:3"),
        ),
        ("rows.jsonl", '{"prompt": "a", "answer": "b"}\n[1]\n', ("JSON object", "rows.jsonl:2")),
        ("rows.jsonl", "[" * 100_000, ("not JSON", "rows.jsonl:1")),
        ("rows.jsonl", '{"answer": ' + "9" * 5000 + "}", ("not JSON", "rows.jsonl:1")),
        ("rows.jsonl", b"\xff\xfe{}\n", ("cannot be read", "rows.jsonl", "utf-8")),
        ("rows.jsonl", "", ("no example is usable", "rows.jsonl", "no rows")),
        (
            "rows.jsonl",
            json.dumps({"prompt": LONG}) + "\n" + json.dumps({"prompt": LONG, "answer": " "}),
            ("no example is usable", "2 dropped: no answer", '{"prompt", "answer"}'),
        ),
        (
            "rows.jsonl",
            json.dumps({"prompt": LONG, "answer": "\ud800"}),
            ("no example is usable", "1 dropped:", "Unicode"),
        ),
        (
            "rows.jsonl",
            json.dumps({"prompt": "short", "answer": "x"}),
            ("no example is usable", "within the window", "--window"),
        ),
        (
            "rows.jsonl",
            json.dumps({"messages": [{"role": "user", "content": LONG}]}),
            ("no example is usable", "do not end with an assistant's answer"),
        ),
        (
            "rows.jsonl",
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": LONG},
                        {"role": "assistant", "content": "x"},
                    ]
                }
            ),
            ("no example is usable", "messages need a tokenizer with a chat template"),
        ),
        ("rows.parquet", b"PAR1", ("parquet", "rows.parquet")),
        ("text.txt", "", ("no sentences", "words")),
        ("text.txt", b"\xff\xfe", ("cannot be read", "text.txt", "utf-8")),
    ],
)
def test_data_that_cannot_be_used_is_refused(
    name: str,
    content: str | bytes | None,
    says: tuple[str, ...],
    sources: dict[str, Path],
    refused: Refused,
    tmp_path: Path,
) -> None:
    data = tmp_path / name if content is None else data_file(tmp_path, name, content)
    source, out = sources["qwen3"], tmp_path / "scores.json"
    refused("calibrate", source, "--out", out, "--data", data, says=says)
    refused("convert", source, tmp_path / "out", "--data", data, says=says)


def test_messages_that_the_chat_template_refuses_are_accounted_for(
    copy_of: CopyOf, refused: Refused, tmp_path: Path
) -> None:
    folder = copy_of("qwen3")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('no system here') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    turns = [("system", LONG), ("user", LONG), ("assistant", "x")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    data = data_file(tmp_path, "rows.jsonl", json.dumps(row))
    refused(
        *("calibrate", folder, "--out", tmp_path / "scores.json", "--data", data),
        says=("no example is usable", "1 dropped: ", "chat template"),
    )


@pytest.mark.parametrize("damage", ["missing", "not JSON", "not a tokenizer"])
def test_a_source_without_a_tokenizer_cannot_be_measured(
    damage: str, copy_of: CopyOf, refused: Refused, tmp_path: Path
) -> None:
    folder = copy_of("qwen3")
    if damage == "missing":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    else:
        (folder / "tokenizer.json").write_text("{" if damage == "not JSON" else "{}")
    refused(
        *("calibrate", folder, "--out", tmp_path / "scores.json"),
        says=("the tokenizer cannot be loaded", folder),
    )


def test_a_tokenizer_of_another_model_is_refused(
    copy_of: CopyOf, refused: Refused, tmp_path: Path
) -> None:
    folder = copy_of("qwen3")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["e"] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(
        *("calibrate", folder, "--out", tmp_path / "scores.json"),
        says=("tokens that the model does not know", folder, "below 320", "got: 5000"),
    )


def test_what_the_operating_system_refuses_is_told_as_such(
    copy_of: CopyOf, refused: Refused, tmp_path: Path
) -> None:
    """A refusal that no check foresaw still names the file and is no traceback."""
    folder = copy_of("qwen3")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()
    refused(
        *("convert", folder, tmp_path / "out", "--layers", "1"),
        says=(folder / "tokenizer.json", "Is a directory"),
    )


# --- outputs ----------------------------------------------------------------------------------


def checkpoint_at(source: Path, out: Path) -> Path:
    """A checkpoint that converts in no time."""
    assert run_cli("convert", source, out, "--layers", "1", "--window", "16") == 0
    return out


def test_an_existing_checkpoint_is_not_replaced_without_force(
    sources: dict[str, Path], refused: Refused, tmp_path: Path
) -> None:
    out = checkpoint_at(sources["qwen3"], tmp_path / "out")
    refused(
        *("convert", sources["qwen3"], out, "--layers", "2"),
        says=("exists already", out, "--force"),
    )
    # A measured conversion is refused before it measures.
    refused("convert", sources["qwen3"], out, says=("exists already", out, "--force"))


def test_an_existing_file_is_not_replaced_without_force(
    sources: dict[str, Path], refused: Refused, tmp_path: Path
) -> None:
    path = tmp_path / "kept.json"
    path.write_text("precious")
    says = ("exists already", path, "--force")
    refused("plan", sources["qwen3"], "--layers", "1", "--out", path, says=says)
    refused("calibrate", sources["qwen3"], "--out", path, says=says)
    refused("convert", sources["qwen3"], path, "--layers", "1", says=says)
    assert path.read_text() == "precious"


def test_a_folder_is_no_place_for_a_file_even_with_force(
    sources: dict[str, Path], refused: Refused, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "kept.txt").write_text("precious")
    says = ("folder", folder)
    refused("plan", sources["qwen3"], "--layers", "1", "--out", folder, "--force", says=says)
    refused("calibrate", sources["qwen3"], "--out", folder, "--force", says=says)
    assert (folder / "kept.txt").read_text() == "precious"


def test_force_replaces_only_checkpoints_of_ours(
    sources: dict[str, Path], refused: Refused, tmp_path: Path
) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.txt").write_text("precious")
    says = ("--force replaces checkpoints of ours only", folder)
    refused("convert", sources["qwen3"], folder, "--layers", "1", "--force", says=says)
    refused(
        *("convert", sources["qwen3"], folder / "chapter.txt", "--layers", "1", "--force"),
        says=("--force replaces checkpoints of ours only", "chapter.txt"),
    )
    assert (folder / "chapter.txt").read_text() == "precious"


def test_force_does_not_replace_another_model(
    copy_of: CopyOf, sources: dict[str, Path], refused: Refused
) -> None:
    other = copy_of("llama")
    refused(
        *("convert", sources["qwen3"], other, "--layers", "1", "--force"),
        says=("--force replaces checkpoints of ours only", other),
    )


def test_a_model_is_not_converted_over_itself(copy_of: CopyOf, refused: Refused) -> None:
    folder = copy_of("qwen3")
    refused("convert", folder, folder, "--layers", "1", says=("exists already", folder))
    refused(
        *("convert", folder, folder, "--layers", "1", "--force"),
        says=("--force replaces checkpoints of ours only", folder),
    )


def test_an_output_that_contains_the_source_is_refused(
    sources: dict[str, Path], refused: Refused, tmp_path: Path
) -> None:
    out = tmp_path / "models"
    source = Path(shutil.copytree(sources["qwen3"], out / "deep" / "source"))
    for force in ([], ["--force"]):
        refused(
            *("convert", source, out, "--layers", "1", *force),
            says=("output folder contains the source", out, source),
        )


def test_an_output_whose_parent_is_missing_is_refused(
    sources: dict[str, Path], refused: Refused, tmp_path: Path
) -> None:
    parent = tmp_path / "none"
    says = ("does not exist", parent, "create it first")
    refused("convert", sources["qwen3"], parent / "out", "--layers", "1", says=says)
    refused("plan", sources["qwen3"], "--layers", "1", "--out", parent / "plan.json", says=says)
    refused("calibrate", sources["qwen3"], "--out", parent / "scores.json", says=says)


def test_an_output_whose_parent_is_a_file_is_refused(
    sources: dict[str, Path], refused: Refused, tmp_path: Path
) -> None:
    parent = tmp_path / "file"
    parent.write_text("precious")
    says = ("does not exist", parent)
    refused("convert", sources["qwen3"], parent / "out", "--layers", "1", says=says)
    refused("plan", sources["qwen3"], "--layers", "1", "--out", parent / "plan.json", says=says)


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
def test_an_output_that_is_a_dangling_link_is_refused(
    force: list[str], sources: dict[str, Path], refused: Refused, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.symlink_to(tmp_path / "nowhere")
    refused("convert", sources["qwen3"], out, "--layers", "1", *force, says=(out,))


def test_a_work_folder_that_is_a_file_is_refused(
    sources: dict[str, Path], refused: Refused, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    work.write_text("precious")
    refused(
        *("calibrate", sources["qwen3"], "--out", tmp_path / "scores.json", "--work", work, "-q"),
        says=("cannot be written", work),
    )


@pytest.fixture
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Mount a tiny disk with the given options; unmounted at the end."""
    mount, unmount = shutil.which("mount"), shutil.which("umount")
    mounted: list[Path] = []

    def make(options: str) -> Path:
        if os.geteuid() != 0 or mount is None or unmount is None:
            pytest.skip("only root can mount a tiny disk")
        folder = tmp_path_factory.mktemp("disk")
        command = [mount, "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("mounting is not permitted here")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run([str(unmount), str(folder)], check=True)


def test_weights_that_do_not_fit_on_the_disk_are_refused(
    disk: Callable[[str], Path], sources: dict[str, Path], refused: Refused
) -> None:
    small = disk("size=1m")
    refused(
        *("convert", sources["qwen3"], small / "out", "--layers", "1"),
        says=("too little free space", "expected", "bytes", "free some space"),
    )
    assert list(small.iterdir()) == []


def test_a_full_disk_is_told_as_such(
    disk: Callable[[str], Path], sources: dict[str, Path], refused: Refused
) -> None:
    full = disk("size=64k")
    kept = full / "kept.json"
    kept.write_text("precious")
    room = full / "filler"
    with room.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(b"\0" * 4096)
    before = tree(full)
    source = sources["qwen3"]
    says = ("cannot be written", full, "No space left on device", "free some space")
    refused("plan", source, "--layers", "1", "--out", full / "plan.json", says=says)
    refused("plan", source, "--layers", "1", "--out", kept, "--force", says=says)
    assert tree(full) == before
    assert kept.read_text() == "precious"
    refused("convert", source, full / "out", "--layers", "1", says=("space", "next step"))
    assert tree(full) == before


def test_a_disk_that_is_full_when_measuring_starts_is_told_as_such(
    disk: Callable[[str], Path],
    sources: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    full = disk("size=64k")
    with (full / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="space"):
        while True:
            file.write(b"\0" * 4096)
    out = tmp_path / "scores.json"
    command = ("calibrate", sources["qwen3"], "--out", out, "--work", full / "work", "-q")
    assert run_cli(*command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the output cannot be written")
    assert "No space left on device" in error
    assert not out.exists()


def test_a_disk_that_may_not_be_written_to_is_told_as_such(
    disk: Callable[[str], Path], sources: dict[str, Path], refused: Refused, tmp_path: Path
) -> None:
    locked, source = disk("ro,size=1m"), sources["qwen3"]
    says = ("cannot be written", locked, "Read-only file system", "you may write to")
    refused("plan", source, "--layers", "1", "--out", locked / "plan.json", says=says)
    refused("convert", source, locked / "out", "--layers", "1", says=says)
    refused("calibrate", source, "--out", locked / "scores.json", "-q", says=says)
    refused(
        *("calibrate", source, "--out", tmp_path / "scores.json", "--work", locked, "-q"),
        says=says,
    )


def test_a_folder_without_permission_is_told_as_such(
    sources: dict[str, Path], refused: Refused, tmp_path: Path
) -> None:
    if os.geteuid() == 0:
        pytest.skip("root ignores permissions")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    says = ("cannot be written", locked, "Permission denied", "you may write to")
    source = sources["qwen3"]
    refused("plan", source, "--layers", "1", "--out", locked / "plan.json", says=says)
    refused("convert", source, locked / "out", "--layers", "1", says=says)


# --- recipes ----------------------------------------------------------------------------------


def test_an_unknown_recipe_is_refused_with_the_nearest_name(refused: Refused) -> None:
    names = recipe_names()
    if not names:
        pytest.skip("no recipes ship yet")
    wrong = f"{names[0]}x"
    refused(
        *("recipes", "show", wrong),
        says=("no such recipe", wrong, *names, "next step: did you mean"),
    )


def test_an_unknown_recipe_is_refused_by_every_command_that_takes_one(
    sources: dict[str, Path], refused: Refused, tmp_path: Path
) -> None:
    source, says = sources["qwen3"], ("no such recipe", "zzz.toml", "a file")
    refused("convert", source, tmp_path / "out", "--recipe", "zzz.toml", says=says)
    refused("plan", source, "--recipe", "zzz.toml", says=says)
    refused("calibrate", source, "--out", tmp_path / "s.json", "--recipe", "zzz.toml", says=says)
    refused("recipes", "check", "zzz.toml", says=says)


def recipe_at(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_everything_wrong_in_a_recipe_is_told_at_once(
    sources: dict[str, Path], refused: Refused, tmp_path: Path
) -> None:
    recipe = recipe_at(
        tmp_path,
        'windw = 16\nbudgett = "1/4"\nsamples = "many"\nmethod = "nll-restor"\nseed = -1\n'
        'layers = ["a"]\nfull_decode = 1\nzzzzzz = 1\n',
    )
    says = (
        "mine.toml: windw: there is no such setting; did you mean window?",
        "mine.toml: budgett: there is no such setting; did you mean budget?",
        "mine.toml: samples: expected a whole number, got 'many'",
        "mine.toml: method: expected one of",
        "did you mean nll-restore?",
        "mine.toml: seed: expected at least 0, got -1",
        "mine.toml: layers: expected layer numbers",
        "mine.toml: full_decode: expected true or false, got 1",
        "mine.toml: zzzzzz: there is no such setting; known: source, ",
    )
    source = sources["qwen3"]
    refused("convert", source, tmp_path / "out", "--recipe", recipe, says=says)
    refused("recipes", "check", recipe, says=says)


def test_a_recipe_that_is_not_toml_is_refused(refused: Refused, tmp_path: Path) -> None:
    says = ("not valid TOML", "mine.toml")
    refused("recipes", "check", recipe_at(tmp_path, "window 16"), says=(*says, "line 1"))
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe")
    refused("recipes", "check", tmp_path / "mine.toml", says=says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("windw=8", ("--set windw: there is no such setting; did you mean window?",)),
        ("window", ("--set window: expected key=value",)),
        ("window=wide", ("--set window: expected a whole number, got 'wide'",)),
        ("full-decode=maybe", ("--set full_decode: expected true or false, got 'maybe'",)),
        ("=8", ("there is no such setting",)),
    ],
)
def test_a_set_that_makes_no_sense_is_refused(
    text: str,
    says: tuple[str, ...],
    sources: dict[str, Path],
    refused: Refused,
    tmp_path: Path,
) -> None:
    refused("convert", sources["qwen3"], tmp_path / "out", "--set", text, says=says)


# --- checkpoints ------------------------------------------------------------------------------


def test_verify_and_retarget_refuse_what_is_no_checkpoint(
    copy_of: CopyOf, refused: Refused, tmp_path: Path
) -> None:
    says = ("not a checkpoint written by hybridize", "source_config.json", "hybridize convert")
    for folder in (tmp_path / "none", tmp_path, copy_of("qwen3")):
        refused("verify", folder, says=(*says, folder))
        refused("retarget", folder, "--budget", "1/2", says=(*says, folder))


def test_retarget_by_budget_needs_scores(
    sources: dict[str, Path], refused: Refused, tmp_path: Path
) -> None:
    out = checkpoint_at(sources["qwen3"], tmp_path / "out")
    refused("retarget", out, "--budget", "1/2", says=("carries no scores", out, "--layers"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], ("new plan", "--budget 1/2 or --layers 3,7,11")),
        (["--layers", "9"], ("no such layer", "0 to 3", "got: 9")),
        (["--layers", "2", "--budget", "1"], ("layers and budget",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_retarget_that_makes_no_sense_leaves_the_checkpoint_alone(
    options: list[str],
    says: tuple[str, ...],
    sources: dict[str, Path],
    refused: Refused,
    tmp_path: Path,
) -> None:
    out = checkpoint_at(sources["qwen3"], tmp_path / "out")
    refused("retarget", out, *options, says=says)


def test_a_retarget_is_held_against_the_target(
    sources: dict[str, Path], refused: Refused, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ("--layers", "1", "--window", "16", "--full-decode", "-q")
    assert run_cli("convert", sources["qwen3"], out, *options) == 0
    refused("retarget", out, "--layers", "2", "--target", "mlx", says=("mlx-lm", "--target"))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("hybrid/plan.json", "{", ("plan.json", "not valid JSON")),
        ("hybrid/plan.json", "{}", ("plan.json", "format_version")),
        ("hybrid/scores.json", "{}", ("scores.json", "format_version")),
        ("hybrid/manifest.json", "[]", ("manifest.json", "JSON object")),
        ("hybrid/manifest.json", "{}", ("manifest", "source")),
        ("hybrid/source_config.json", "{", ("source_config.json", "not valid JSON")),
    ],
)
def test_a_damaged_checkpoint_is_not_retargeted(
    name: str,
    text: str,
    says: tuple[str, ...],
    sources: dict[str, Path],
    refused: Refused,
    tmp_path: Path,
) -> None:
    out = checkpoint_at(sources["qwen3"], tmp_path / "out")
    (out / name).write_text(text)
    refused("retarget", out, "--budget", "1/2", says=says)


def test_a_checkpoint_is_not_a_source(
    sources: dict[str, Path], refused: Refused, tmp_path: Path
) -> None:
    out = checkpoint_at(sources["qwen3"], tmp_path / "first")
    refused(
        *("convert", out, tmp_path / "second", "--layers", "1"),
        says=("a hybrid checkpoint already", "retarget"),
    )


# --- usage, help, interrupts ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Missing command"),
        (["conver"], "conver"),
        (["inspect"], "SOURCE"),
        (["inspect", "a", "b"], "unexpected extra argument"),
        (["plan", "a", "--bugdet", "1"], "--budget"),
        (["plan", "a", "--window", "wide"], "not a valid integer"),
        (["plan", "a", "--context", "0"], "--context"),
        (["calibrate", "a"], "--out"),
        (["calibrate", "a", "--out"], "--out"),
        (["convert", "a", "b", "--target", "ollama"], "llama.cpp"),
        (["convert", "a", "b", "--dtype", "int4"], "bfloat16"),
        (["recipes", "chek", "a"], "chek"),
        (["verify", "a", "--dtype", "auto"], "float64"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_refused(arguments: list[str], says: str, misused: Refused) -> None:
    misused(*arguments, says=(says,))


def test_convert_without_an_output_is_refused(sources: dict[str, Path], refused: Refused) -> None:
    refused("convert", says=("SOURCE OUT",))
    refused("convert", sources["qwen3"], says=("SOURCE OUT",))


def every_command() -> list[tuple[str, ...]]:
    """The words of every command, the groups among them."""
    found: list[tuple[str, ...]] = [()]
    for name, command in sorted(hybridize.commands.items()):
        found.append((name,))
        if isinstance(command, click.Group):
            found += [(name, inner) for inner in sorted(command.commands)]
    return found


@pytest.mark.parametrize("words", every_command(), ids=" ".join)
def test_help_documents_every_option(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(*words, "--help") == 0
    text = capsys.readouterr().out
    assert text.startswith(f"Usage: {' '.join(('hybridize', *words))}")
    command: click.Command = hybridize
    for word in words:
        assert isinstance(command, click.Group)
        command = command.commands[word]
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.opts[-1] in text
            assert parameter.help, parameter.opts
        else:
            assert str(parameter.metavar or parameter.name).upper() in text


def test_help_imports_neither_torch_nor_transformers() -> None:
    program = (
        "import sys\n"
        "from converter.cli import run\n"
        f"assert not any(run([*words, '--help']) for words in {every_command()!r})\n"
        "heavy = {'torch', 'transformers', 'numpy', 'huggingface_hub', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "[]"


def test_ctrl_c_exits_with_130_and_keeps_what_was_measured(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    rows = [json.dumps({"prompt": f"{i} " + LONG * 2, "answer": "x"}) for i in range(3000)]
    data = data_file(tmp_path, "rows.jsonl", "\n".join(rows))
    out, work = tmp_path / "scores.json", tmp_path / "work"
    command = [sys.executable, "-m", "converter", "calibrate", str(sources["qwen3"])]
    options = ["--data", str(data), "--samples", "3000", "--work", str(work), "--out", str(out)]
    # A race might be over before it can be interrupted.
    options += ["--exact", "--method", "nll-restore"]
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    log = work / "scores.jsonl"
    for _ in range(1200):
        if process.poll() is not None or (log.exists() and log.read_bytes().count(b"\n") > 2):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    result, talk = process.communicate(timeout=60)
    assert process.returncode == 130
    assert result == ""
    assert "Traceback" not in talk
    assert talk.rstrip().endswith("interrupted: run the same command again to resume")
    assert not out.exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert all(json.loads(line) for line in log.read_text().splitlines())


def test_results_reach_a_terminal_that_cannot_show_them(sources: dict[str, Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "converter", "plan", str(sources["qwen3"]), "--layers", "1"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "full attention" in done.stdout


def test_a_reader_that_goes_away_is_no_error(sources: dict[str, Path]) -> None:
    read, write = os.pipe()
    os.close(read)
    # Without the buffer, the first line already meets the closed pipe.
    done = subprocess.run(
        [sys.executable, "-m", "converter", "inspect", str(sources["qwen3"]), "--json"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_folder_whose_name_is_not_unicode_converts(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    source = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    shutil.copytree(sources["qwen3"], source)
    out = tmp_path / "out"
    assert run_cli("convert", source, out, "--layers", "1", "--json") == 0
    assert json.loads((out / "config.json").read_text())["hybrid"]["source"].startswith("caf")


def test_the_tokenizer_of_these_tests_has_no_chat_template(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    assert not (tmp_path / "chat_template.jinja").exists()
