"""From a model folder to a verified checkpoint: further families, and configs as published.

Published checkpoints have the keys that transformers wrote before version 5.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MIXED_FAMILIES, MORE_FAMILIES, make_model, run_cli

# What the published models of each family add; None leaves a key out.
ADDED: dict[str, dict[str, Any]] = {
    "llama": {"pretraining_tp": 1, "head_dim": None},
    "qwen2": {"sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 28},
    "qwen3": {"max_window_layers": 4},
    "mistral": {},
    "phi3": {"sliding_window": 262144},
    "gemma": {"tie_word_embeddings": None},
}


def publish(folder: Path, added: dict[str, Any]) -> None:
    """Rewrite a folder's config.json with the older keys."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.43.0"
    config.pop("layer_types", None)
    absent = [key for key, value in added.items() if value is None]
    path.write_text(json.dumps({k: v for k, v in (config | added).items() if k not in absent}))


@pytest.mark.parametrize("family", ADDED)
def test_an_older_config_converts_and_verifies(family: str, tmp_path: Path) -> None:
    source = make_model(tmp_path / family, family)
    publish(source, ADDED[family])
    options = ("--layers", "1", "--window", "16", "--verify", "-q")
    assert run_cli("convert", source, tmp_path / "out", *options) == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    original = json.loads((source / "config.json").read_text())
    for key in ("rope_theta", "rope_scaling", "torch_dtype"):
        assert written[key] == original[key]


@pytest.mark.parametrize("options", [(), ("--sinks", "3", "--full-decode")], ids=str)
@pytest.mark.parametrize("family", [*MORE_FAMILIES, *MIXED_FAMILIES])
def test_a_further_family_converts_and_verifies(
    family: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    source = make_model(tmp_path / family, family)
    arguments = ("--layers", "1", "--window", "16", *options, "--verify")
    assert run_cli("convert", source, tmp_path / "out", *arguments) == 0
