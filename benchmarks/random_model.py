"""A model folder of random weights and of any size, made on the device that will run it."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from converter.model.dimensions import read_shape
from converter.model.families import family_of

# Layers in one file.
_SHARD_LAYERS = 6
# Large enough for attention to prefer some keys, so that masks matter.
_NORM_OF_QUERIES_AND_KEYS = 2.0


def write_random_model(folder: Path, config: dict[str, Any], device: str) -> int:
    """Write a model in bfloat16, and a tokenizer of one token a byte.

    Args:
        folder: an existing empty folder.
        config: a Qwen3's config.json.
        device: where the numbers are drawn.

    Returns:
        Bytes of all tensors.
    """
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    family = family_of(config["model_type"], folder)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in family.expected_tensors(config, read_shape(config, folder)).items():
        layer = name.removeprefix("model.layers.").split(".")[0]
        part = str(int(layer) // _SHARD_LAYERS) if layer.isdigit() else "rest"
        shards.setdefault(f"model-{part}.safetensors", {})[name] = shape
    total, home = 0, dict[str, str]()
    generator = torch.Generator(device).manual_seed(0)
    for shard, shapes in shards.items():
        tensors = {name: _drawn(name, shape, generator) for name, shape in shapes.items()}
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        home |= dict.fromkeys(tensors, shard)
        total += sum(2 * tensor.numel() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": home}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    _write_tokenizer(folder)
    return total


def _drawn(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    device = generator.device
    if len(shape) > 1:
        drawn = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        return (drawn * 0.03).cpu()
    sharp = name.endswith(("q_norm.weight", "k_norm.weight"))
    return torch.full(shape, _NORM_OF_QUERIES_AND_KEYS if sharp else 1.0, dtype=torch.bfloat16)


def _write_tokenizer(folder: Path) -> None:
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|end|>"]
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "TokenizersBackend", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def write_rows(path: Path, count: int, tokens: int) -> None:
    """Rows of data that take so many tokens of that tokenizer, with an answer of 16."""
    with path.open("w", encoding="utf-8") as file:
        for row in range(count):
            generator = torch.Generator().manual_seed(row)
            drawn = torch.randint(26, (tokens,), generator=generator).tolist()
            text = "".join(string.ascii_lowercase[letter] for letter in drawn)
            file.write(json.dumps({"prompt": text[:-16], "answer": text[-16:]}) + "\n")
