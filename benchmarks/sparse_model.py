"""A model folder of any size that takes no disk: real headers over files with holes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from converter.model.families import family_of

# The sizes of Qwen3-4B, 8.04 GB in bfloat16.
QWEN3_4B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "torch_dtype": "bfloat16",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}


def write_sparse_model(folder: Path, config: dict[str, Any], shards: int) -> int:
    """Write config.json, an index and bfloat16 shards whose data is a hole.

    Args:
        folder: an existing empty folder.
        config: a model's config.json, of a supported family.
        shards: how many weight files.

    Returns:
        Bytes of all tensors.
    """
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    family = family_of(config["model_type"], folder)
    tensors = list(family.expected_tensors(config, family.dimensions(config, folder)).items())
    weight_map: dict[str, str] = {}
    total = 0
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        header: dict[str, Any] = {}
        end = 0
        for tensor, shape in tensors[shard::shards]:
            size = 2 * math.prod(shape)
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            weight_map[tensor] = name
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        total += end
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total
