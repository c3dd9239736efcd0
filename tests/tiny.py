"""Model folders of zeros, made without torch: for tests that read sizes and headers only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
from safetensors.numpy import save_file

from converter.model.families import FAMILIES

CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "num_hidden_layers": 4,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "vocab_size": 32,
    "max_position_embeddings": 512,
    "dtype": "bfloat16",
    "rms_norm_eps": 1e-6,
}


def config_of(**changes: Any) -> dict[str, Any]:
    """A small config; None removes a key."""
    return {key: value for key, value in (CONFIG | changes).items() if value is not None}


def tiny_model(folder: Path, **changes: Any) -> Path:
    """Write a model of zeros whose weights fit its config."""
    config = config_of(**changes)
    family = FAMILIES[config["model_type"]]
    if family.inside:
        config = {"model_type": family.model_type, family.inside: config}
    wanted = family.expected_tensors(config, family.dimensions(config, folder))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: numpy.zeros(size, numpy.float32) for name, size in wanted.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder
