"""GGUF files of tiny models, and what tests of several files ask of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from converter.engines.gguf.container import read_container
from converter.engines.gguf.llama_cpp import LlamaCppSettings
from converter.engines.gguf.process import LlamaCppProcess
from converter.engines.gguf.writer import GgufModel, write_model
from converter.model.families.stock_gguf import Value
from tests.conftest import make_model, run_cli
from tests.hybrids import KEPT, WINDOW

# What fixtures give: a file by name, a command's message, and the JSON that a command prints.
Files, Refused, Told = Callable[..., Path], Callable[..., str], Callable[..., Any]
Pair = tuple[Path, Path]
# The splitting rule of Qwen2's tokenizers, which llama.cpp knows by name.
RULE = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}"
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)


def make_bpe_tokenizer(folder: Path, **settings: Any) -> None:
    """A byte-level tokenizer with a few merges, split by Qwen2's rule."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("in", "g"), ("Ã", "¡")]
    words = [*letters, *(left + right for left, right in merges)]
    model = models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=merges)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(["<|end|>", "<|user|>"])
    split = pre_tokenizers.Split(Regex(RULE), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def hybrid_of(folder: Path, family: str, *options: object, **changes: Any) -> Path:
    """A random model of a family with a tokenizer that can be exported, converted."""
    source, out = folder / f"{family}-source", folder / f"{family}-hybrid"
    make_model(source, family, **changes)
    make_bpe_tokenizer(source)
    wanted = options or ("--layers", ",".join(map(str, KEPT)), "--window", WINDOW)
    assert run_cli("convert", source, out, *wanted, "-q", "--json") == 0
    return out


def exported(checkpoint: Path, file: Path, *options: object) -> Path:
    """The checkpoint as a GGUF, by the command line."""
    assert run_cli("export", checkpoint, file, *options, "-q", "--json") == 0
    return file


def loaded_gguf(file: Path, settings: LlamaCppSettings) -> LlamaCppProcess:
    """The file in llama.cpp; a context manager."""
    return LlamaCppProcess(file, settings, lambda told: logging.getLogger(__name__).warning(told))


def logits_of(file: Path, ids: list[int], **overrides: int) -> Any:
    """llama.cpp's logits (tokens, vocabulary) of a text, in float32, with some metadata changed."""
    settings = LlamaCppSettings(len(ids), exact=True, overrides=overrides)
    with loaded_gguf(file, settings) as engine:
        return engine.feed(ids, range(len(ids)))


def rewritten(
    file: Path,
    out: Path,
    changes: Mapping[str, Value | None],
    names: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """A copy with other metadata (None removes a key) and names of tensors (none removes one)."""
    container = read_container(file)
    general = {k: v for k, v in {**container.metadata, **changes}.items() if v is not None}
    tensors = (replace(t, name=names.get(t.name, t.name)) for t in container.tensors)
    kept = tuple(tensor for tensor in tensors if tensor.name)
    write_model(GgufModel(container.arch, {}, general, kept), out)
    return out
