"""The model being converted: found, checked and described without loading it."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from converter.common.errors import FamilyError, SourceError
from converter.common.files import check_free_space, open_file, read_json_object
from converter.model.code_keys import data_only
from converter.model.dimensions import ModelDimensions, read_shape
from converter.model.families import FAMILIES, family_of
from converter.model.families.base import Family
from converter.model.identity import WatchedFiles, start_hashing
from converter.model.weights import (
    INDEX_NAME,
    Weights,
    contained,
    find_weights,
    listed_shards,
    shard_names,
)

_log = logging.getLogger(__name__)

# What a conversion reads of a Hub repository, beside the weights that its index names.
_HUB_PATTERNS = (
    *("*.json", "*.jinja", "*.model", "*.txt"),
    *("LICENSE*", "NOTICE*", "USE_POLICY*", "README.md"),
)

# More than any model has.
_MOST_LAYERS = 4096

# Optional keys of a config that decisions are made on.
_KINDS: dict[str, tuple[Any, str]] = {
    "layer_types": (list, "a list"),
    "sliding_window": (int, "a whole number"),
    "rope_parameters": (dict, "an object"),
    "rope_scaling": (dict, "an object"),
    "rope_theta": ((int, float), "a number"),
}

# What libraries open by themselves when they find it.
_READ = (".json", ".jinja", ".model", ".txt", ".safetensors")
# Files beside the weights that decide what a model computes, or what text it is given. The first
# three are part of its fingerprint.
_SMALL_FILES = (
    *("tokenizer.json", "tokenizer.model", "chat_template.jinja"),
    *("config.json", INDEX_NAME, "tokenizer_config.json", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "generation_config.json"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
)
# Larger than any published tokenizer or template, and small enough to be read.
_LARGEST_FILE_BYTES = 128 << 20
_LARGEST_TEMPLATE_BYTES = 1 << 20


@dataclass(frozen=True)
class Source:
    """A checked source.

    Attributes:
        name: how the user named it: a Hub id, or the folder's name.
        revision: its commit, when it came from the Hub.
        config: its config.json.
        files: what it is read from, to be checked again at every stage.
    """

    folder: Path
    name: str
    revision: str | None
    config: Mapping[str, Any]
    family: Family
    shape: ModelDimensions
    weights: Weights
    files: WatchedFiles

    @property
    def language(self) -> Mapping[str, Any]:
        """The configuration of its language model."""
        return self.family.language(self.config)

    def layer_tensors(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Shapes of a layer's tensors as its files hold them, by suffix."""
        packed = self.weights.packed_experts
        return self.family.stored_layer(self.config, self.shape, layer, packed=packed)

    @property
    def native_config(self) -> dict[str, Any]:
        """The config as transformers' own classes may read it: without keys that name code."""
        return data_only(self.config, self.folder / "config.json")

    @cached_property
    def fingerprint(self) -> str:
        """A hash over the config, the weights (sampled) and the tokenizer; found at once.

        Raises:
            SourceError: a file changed since the source was opened.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for sampled in self.files.sampled_hashes().values():
            digest.update(sampled.encode())
        for name in _SMALL_FILES[:3]:
            path = self.folder / name
            digest.update(path.read_bytes() if path.exists() else b"")
        self.files.check()
        return digest.hexdigest()

    @cached_property
    def hashing(self) -> Future[dict[Path, str]]:
        """Whole hashes of the weights; asked for early, they are found beside other work."""
        return start_hashing([self.folder / name for name in self.weights.shards])

    @property
    def weight_hashes(self) -> dict[str, str]:
        """SHA-256 of every weight file, by name; waits for `hashing`.

        Raises:
            SourceError: a file changed since the source was opened.
        """
        found = self.hashing.result()
        self.files.check()
        return {path.name: digest for path, digest in found.items()}

    @property
    def identity(self) -> dict[str, Any]:
        """What tells the model that was measured from every other, as results record it."""
        return {"source": self.fingerprint, "weights": self.weight_hashes}


def open_source(text: str, *, revision: str | None = None, offline: bool = False) -> Source:
    """Open a model folder or Hub id and check all that can be checked without loading weights.

    Raises:
        SourceError: it is missing, is not a model, or its files are damaged.
        FamilyError: its architecture or this variant of it is not supported.
        PickledWeightsError: it has only pickled weights.
    """
    folder = Path(text)
    # Unlike `Path.exists`, this is also false for names that are too long to be looked up.
    if os.path.exists(folder):  # noqa: PTH110
        if revision is not None:
            raise SourceError(
                "--revision goes with a Hub id, and this is a local path", where=folder
            )
        # Names on disk may be any bytes; what goes into files is Unicode.
        name = os.fsencode(folder.resolve().name).decode("utf-8", "replace")
        return checked_source(folder, name, None, _read_config(folder))
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise SourceError(
            "there is no such model",
            where=text,
            expected="a folder with config.json and safetensors, or a Hub id OWNER/NAME",
        )
    folder, commit = _download(text, revision, offline)
    return checked_source(folder, text, commit, _read_config(folder))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise SourceError(
            "this is not a model folder",
            where=folder,
            expected="a folder with config.json",
            next_step="point at a transformers checkpoint, not at a single file or its parent",
        )
    config = read_json_object(contained(folder, path.name), SourceError)
    if "hybrid" in config:
        raise SourceError(
            "this model is a hybrid checkpoint already",
            where=path,
            next_step="change its plan with: hybridize retarget OUT --budget 1/2, "
            "or convert the model it was made from",
        )
    return config


def _check_config(config: dict[str, Any], where: Path) -> tuple[Family, ModelDimensions]:
    """Refuse a model whose configuration alone says that it cannot be converted."""
    _refuse_multimodal(config, where)
    family = family_of(config.get("model_type"), where)
    if family.inside and not isinstance(config.get(family.inside), dict):
        raise _unusable(config, family.inside, "an object", where)
    language = family.language(config)
    # Before a word is made for each of a billion layers.
    if read_shape(language, where).layers > _MOST_LAYERS:
        raise _unusable(language, "num_hidden_layers", f"at most {_MOST_LAYERS}", where)
    for key, (kind, name) in _KINDS.items():
        value = language.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise _unusable(language, key, name, where)
    if "quantization_config" in (either := {**language, **config}):
        raise FamilyError(
            "quantized weights cannot be converted",
            where=where,
            got=f"quantization_config {json.dumps(either['quantization_config'])}",
            next_step="convert the unquantized model, then quantize the result",
        )
    if reason := family.refuse(language):
        raise FamilyError(
            f"this {family.title} model cannot be converted: {reason}",
            where=where,
            expected="a model that it can convert, such as one whose layers all attend fully",
        )
    return family, family.dimensions(config, where)


def _unusable(config: Mapping[str, Any], key: str, expected: str, where: Path) -> SourceError:
    return SourceError(
        f"the model's configuration has no usable {key!r}",
        where=where,
        expected=expected,
        got=repr(config.get(key, "nothing")),
        next_step="check that this is the model's own config.json",
    )


def _refuse_multimodal(config: Mapping[str, Any], where: Path) -> None:
    """Refuse a model that holds its language model beside others in a way that is not known."""
    inside = config.get("text_config")
    if not isinstance(inside, dict) or str(config.get("model_type")) in FAMILIES:
        return
    raise FamilyError(
        "this kind of multimodal model cannot be converted",
        where=where,
        expected="model_type " + ", ".join(FAMILIES),
        got=f"{config.get('model_type')!r} around {inside.get('model_type')!r}",
        next_step="save its language model to a folder, as docs/checkpoint.md shows, and take that"
        if str(inside.get("model_type")) in FAMILIES
        else "choose a release of it that is text only, if there is one",
    )


def checked_source(folder: Path, name: str, revision: str | None, config: dict[str, Any]) -> Source:
    """A model folder under a config, checked without loading weights.

    Raises:
        SourceError: its files are damaged, or do not fit the config.
        FamilyError: its architecture or this variant of it is not supported.
        PickledWeightsError: it has only pickled weights.
    """
    family, shape = _check_config(config, folder / "config.json")
    _check_files(folder)
    # Before anything is read of them.
    files = WatchedFiles(folder, shard_names(folder), _SMALL_FILES)
    weights = find_weights(folder)

    def unfit(which: str, expected: str, got: str) -> SourceError:
        return SourceError(
            f"the weights do not fit the configuration{which}",
            where=folder,
            expected=expected,
            got=got,
            next_step="check that config.json and the weights belong together",
        )

    # Before a list of tensors is made for each of a billion layers.
    shapes = weights.shapes
    if shape.layers > len(shapes):
        layers = f"{shape.layers} layers (num_hidden_layers)"
        raise unfit("", layers, f"{len(shapes)} tensors")
    packed = weights.packed_experts
    for tensor, expected in family.expected_tensors(config, shape, packed=packed).items():
        found = shapes.get(tensor)
        if found != expected:
            got = "no such tensor" if found is None else f"shape {list(found)}"
            raise unfit(f": {tensor}", f"shape {list(expected)}", got)
    return Source(folder, name, revision, config, family, shape, weights, files)


def _check_files(folder: Path) -> None:
    """Refuse what libraries would wait for, follow out of the model, or read whole at any size."""
    # transformers looks into one folder below it.
    for path in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        # What is carried out of folders inside the model is checked when it is carried.
        if path.is_symlink() and not path.is_dir():
            contained(folder, path.relative_to(folder).as_posix())
        if path.suffix not in _READ:
            continue
        template = path.suffix == ".jinja" or path.name.startswith("chat_template")
        limit = _LARGEST_TEMPLATE_BYTES if template else _LARGEST_FILE_BYTES
        advice = "do not use this model unless you trust who made it"
        largest = None if path.suffix == ".safetensors" else limit
        open_file(path, SourceError, limit_bytes=largest, next_step=advice).close()


def _download(name: str, revision: str | None, offline: bool) -> tuple[Path, str]:
    """The folder and commit of a Hub repository, with what a conversion needs of it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    from converter.common.hub import RetryPolicy, downloading, with_retries

    take = partial(snapshot_download, name, ignore_patterns=["*/*"])

    def fetch(patterns: list[str], at: str | None) -> Path:
        act = partial(take, revision=at, local_files_only=offline, allow_patterns=patterns)
        return Path(with_retries(act, RetryPolicy(), _log.warning))

    absent = "the model is neither a local folder nor in the local Hub cache"
    with downloading("model", name, SourceError, absent, offline=offline):
        # A model that cannot be converted costs no download.
        folder = fetch(["config.json", INDEX_NAME], revision)
        _check_config(_read_config(folder), folder / "config.json")
        index, commit = folder / INDEX_NAME, folder.name
        shards = listed_shards(index) if index.is_file() else ("model.safetensors",)
        wanted = [*_HUB_PATTERNS, *map(glob.escape, shards)]
        if not offline:
            # Where the Hub cannot be asked, nothing will be downloaded either.
            with suppress(DryRunError):
                _check_disk(take(revision=commit, allow_patterns=wanted, dry_run=True))
        return fetch(wanted, commit), commit


def _check_disk(planned: Sequence[Any]) -> None:
    """Refuse a download (the Hub client's dry run) that the disk of the cache has no room for."""
    from huggingface_hub import constants

    missing = sum(file.file_size or 0 for file in planned if file.will_download)
    if missing:
        cache = Path(constants.HF_HUB_CACHE)
        cache.mkdir(parents=True, exist_ok=True)
        check_free_space(cache, missing, "free some space, or point HF_HOME at another disk")
