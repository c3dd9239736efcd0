"""What is no model, or none that can be converted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from converter.model.families import FAMILIES
from tests.cli.bad_input.conftest import Refused, edit_json
from tests.conftest import CONTEXT, LAYERS, run_cli

CopyOf = Callable[[str], Path]
Change = Callable[[Path], object]

SHARD = "model-00002-of-00005.safetensors"
# A tensor of that shard.
TENSOR = "model.layers.0.mlp.down_proj.weight"
COPY = "model-copy.safetensors"
INDEX, CONFIG = "model.safetensors.index.json", "config.json"
NO_FOLDER = (
    "not a model folder",
    "a folder with config.json",
)
POSITIVE = "positive integer"
QUANTIZED = ("quantized", CONFIG, "unquantized")
COMMANDS = (
    "inspect $MODEL",
    "plan $MODEL --layers 1 --out $HERE/plan.json",
    "calibrate $MODEL --out $HERE/scores.json",
    "convert $MODEL $HERE/out --layers 1",
    "convert $MODEL $HERE/out",
)


def config(**changes: Any) -> Change:
    """Change keys of config.json; None removes one."""
    return lambda folder: edit_json(folder / CONFIG, **changes)


def index(tensor: str, shard: str) -> Change:
    """Let the index say that a tensor stands in that shard."""

    def change(folder: Path) -> None:
        listed = json.loads((folder / INDEX).read_text())["weight_map"]
        edit_json(folder / INDEX, weight_map=listed | {tensor: shard})

    return change


def text(name: str, content: str | bytes) -> Change:
    """Write a file anew."""
    raw = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(raw)


def cut_to(size: int) -> Change:
    """Leave so many bytes of the shard, counted from its end when negative."""
    return lambda folder: text(SHARD, (folder / SHARD).read_bytes()[:size])(folder)


def without(*patterns: str) -> Change:
    """Remove files."""
    return lambda folder: [p.unlink() for pattern in patterns for p in folder.glob(pattern)]


def both(*changes: Change) -> Change:
    """One change after the other."""
    return lambda folder: [change(folder) for change in changes]


def linked_from_elsewhere(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere.weights"
    (folder / SHARD).rename(elsewhere)
    (folder / SHARD).symlink_to(elsewhere)


# What it is, how a model becomes that, and what is said; without what tests/hostile.py tries.
NOT_MODELS: tuple[tuple[str, Change, *tuple[str, ...]], ...] = (
    ("a missing folder", shutil.rmtree, "no such model", "expected: a folder with config.json"),
    ("an empty folder", both(shutil.rmtree, Path.mkdir), *NO_FOLDER),
    ("a file", both(shutil.rmtree, Path.touch), *NO_FOLDER),
    ("no config", without(CONFIG), "not a model folder", CONFIG),
    ("half a config", text(CONFIG, '{"model_type": "qwen3",'), "not valid JSON", CONFIG, "line 1"),
    ("no text", text(CONFIG, b"\xff\xfe{}"), "cannot be read", CONFIG, "UTF-8"),
    ("a list", text(CONFIG, '["qwen3"]'), "does not hold a JSON object", CONFIG, "list"),
    ("not a number", config(rms_norm_eps=float("nan")), "not valid JSON", CONFIG, "NaN"),
    ("an endless number", text(CONFIG, f'{{"a": {"9" * 5000}}}'), "not valid JSON", CONFIG),
    ("no depth", config(num_hidden_layers=None), "num_hidden_layers", POSITIVE, "nothing"),
    ("a size that is text", config(hidden_size="64"), "hidden_size", POSITIVE, "got: '64'"),
    ("no heads", config(num_attention_heads=0), "num_attention_heads", POSITIVE, "got: 0"),
    ("an unsupported family", config(model_type="mamba2"), "not supported", "'mamba2'", *FAMILIES),
    ("no model type", config(model_type=None), "not supported", "got: None", "qwen3"),
    ("a listed type", config(model_type=["qwen2"]), "not supported", "['qwen2']", "qwen3"),
    ("types as a number", config(layer_types=5), CONFIG, "layer_types"),
    ("types as text", config(layer_types="full_attention"), CONFIG, "layer_types"),
    ("a window of text", config(sliding_window="128"), CONFIG, "sliding_window"),
    ("half a token", config(sliding_window=4.5), CONFIG, "sliding_window"),
    ("a window that is true", config(sliding_window=True), CONFIG, "sliding_window"),
    ("a list for RoPE", config(rope_parameters=[1.0]), CONFIG, "rope_parameters"),
    ("text for RoPE", config(rope_parameters="linear"), CONFIG, "rope_parameters"),
    ("scaling as text", config(rope_scaling="linear"), CONFIG, "rope_scaling"),
    ("a base that is text", config(rope_theta="10000"), CONFIG, "rope_theta"),
    (
        "pickled weights",
        both(without("*.safetensors*"), text("pytorch_model.bin", b"\x80\x04.")),
        *("pickled", "pytorch_model.bin", "*.safetensors"),
    ),
    ("no weights", without("*.safetensors*"), "holds no weights", "model.safetensors"),
    ("a short shard", cut_to(1000), "truncated", SHARD, "1,000 bytes", "download it again"),
    ("a lost byte", cut_to(-1), "truncated", SHARD, "download it again"),
    ("an empty shard", text(SHARD, ""), "truncated", SHARD, "0 bytes"),
    ("a git-lfs pointer", text(SHARD, "version https://git-lfs"), "truncated or damaged", SHARD),
    ("a missing shard", without(SHARD), "missing", SHARD, "download it again"),
    ("a folder as shard", both(without(SHARD), lambda f: (f / SHARD).mkdir()), "a folder", SHARD),
    (
        "an index to the parent",
        index(TENSOR, "../secret.safetensors"),
        *("points at something", INDEX, "'../secret.safetensors'"),
    ),
    ("an index that is not JSON", text(INDEX, "weights"), "not valid JSON", INDEX),
    ("an index without weight_map", text(INDEX, '{"metadata": {}}'), "no weight_map", INDEX),
    ("an index of numbers", text(INDEX, '{"weight_map": {"a": 1}}'), "no weight_map", INDEX),
    ("a foreign shard", linked_from_elsewhere, "symbolic link", SHARD, "elsewhere.weights"),
    (
        "a shard linked to itself",
        both(without(SHARD), lambda folder: (folder / SHARD).symlink_to(SHARD)),
        *("symbolic link", SHARD),
    ),
    ("another tensor", index("extra", SHARD), "disagree about tensor", INDEX, "no shard"),
    ("a wrong shard", index("lm_head.weight", SHARD), "disagree", "'lm_head.weight'", INDEX),
    (
        "a tensor in two shards",
        both(lambda f: shutil.copy(f / SHARD, f / COPY), index(TENSOR, COPY)),
        *("stands in two shards", SHARD, COPY),
    ),
    ("another hidden size", config(hidden_size=128), "do not fit", "[320, 128]", "[320, 64]"),
    (
        "more layers",
        config(num_hidden_layers=LAYERS + 1),
        *("do not fit", "model.layers.4.", "no such tensor"),
    ),
    ("GPTQ", config(quantization_config={"quant_method": "gptq"}), *QUANTIZED, "gptq"),
    ("4bit", config(quantization_config="4bit"), *QUANTIZED, "4bit"),
    (
        "a hybrid",
        config(hybrid={"format_version": 2}),
        *("a hybrid checkpoint already", CONFIG, "retarget"),
    ),
)


@pytest.mark.parametrize("row", NOT_MODELS, ids=lambda row: row[0])
def test_every_command_refuses(
    row: tuple[str, Change, *tuple[str, ...]], copy_of: CopyOf, refused: Refused
) -> None:
    model = copy_of("qwen2")
    _, damage, *says = row
    damage(model)
    for command in COMMANDS:
        refused(command, *says, MODEL=model)


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("mistral", {"sliding_window": 128}, "window of 128 tokens"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64}, "window of 64 tokens"),
        ("qwen3", {"layer_types": ["sliding_attention"] * LAYERS}, "layer_types"),
    ],
)
def test_a_source_that_slides_already_is_refused(
    family: str, changes: dict[str, Any], says: str, copy_of: CopyOf, refused: Refused
) -> None:
    model = copy_of(family)
    config(**changes)(model)
    says_all = ("cannot be converted", "attend fully", says)
    refused("convert $MODEL $HERE/out", *says_all, MODEL=model)


def test_a_window_as_long_as_the_context_is_full_attention(copy_of: CopyOf) -> None:
    model = copy_of("mistral")
    config(sliding_window=CONTEXT)(model)
    assert run_cli("inspect", model) == 0


def test_a_checkpoint_is_not_a_source(hybrid: Path, refused: Refused) -> None:
    says = ("a hybrid checkpoint already", "retarget")
    refused("convert $MODEL $HERE/second --layers 1", *says, MODEL=hybrid)


def test_a_hub_name_that_is_not_cached_is_refused_offline(refused: Refused) -> None:
    refused("inspect nobody/nothing --offline", "nobody/nothing", "--offline")


@pytest.mark.parametrize("name", ["no-such-folder", "a/b/c", "./nothing", "x" * 5000, "a b/c d"])
def test_a_name_that_is_neither_folder_nor_hub_id_is_refused(name: str, refused: Refused) -> None:
    refused(f"inspect '{name}' --offline", name[:20])


def test_a_revision_of_a_local_folder_is_refused(refused: Refused) -> None:
    refused("inspect $SOURCE --revision main", "--revision", "local path")


def test_a_folder_in_the_place_of_a_tokenizer_is_told_as_such(
    copy_of: CopyOf, refused: Refused
) -> None:
    model = copy_of("qwen3")
    both(without("tokenizer.json"), lambda folder: (folder / "tokenizer.json").mkdir())(model)
    says = ("cannot be read", model / "tokenizer.json", "expected: a plain file", "got: a folder")
    refused("convert $MODEL $HERE/out --layers 1", *says, MODEL=model)
