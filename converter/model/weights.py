"""The weight files of a model folder: found, checked and identified without loading them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from converter.common.errors import PickledWeightsError, SourceError
from converter.common.files import open_file, read_json_object

INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# A sampled digest reads this many blocks of this many bytes, spread evenly over the file.
_SAMPLE_BLOCKS = 256
_SAMPLE_BYTES = 4096
# A header of 100,000 tensors takes some ten million bytes.
LARGEST_HEADER_BYTES = 32 << 20


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        start: offset of its first byte in the file.
        dtype: as safetensors names it, such as `BF16`.
        shape: outermost dimension first.
    """

    path: Path
    start: int
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Weights:
    """The weight files of a model.

    Attributes:
        shards: file names inside the folder, sorted.
        tensors: where every tensor lies, by name.
    """

    shards: tuple[str, ...]
    tensors: Mapping[str, StoredTensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name."""
        return {name: stored.shape for name, stored in self.tensors.items()}

    @property
    def packed_experts(self) -> bool:
        """Whether each layer's experts are stored in one tensor, as transformers holds them."""
        return any(name.endswith(".experts.gate_up_proj") for name in self.tensors)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(stored.bytes for stored in self.tensors.values())


def find_weights(folder: Path) -> Weights:
    """Find a folder's safetensors and check that they are whole.

    Only headers are read, so the cost does not grow with the size of the weights.

    Raises:
        PickledWeightsError: there are only pickled weights.
        SourceError: there are none, a shard is missing or truncated, a tensor stands in two
            shards, or the index disagrees with the shards or points outside the folder.
    """
    index, shards = folder / INDEX_NAME, shard_names(folder)
    listed = _read_index(index) if index.exists() else None
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for name, stored in _read_header(contained(folder, shard)).items():
            if name in tensors:
                where = f"{tensors[name].path.name}, {shard}"
                raise SourceError(f"tensor {name!r} stands in two shards", where=where)
            tensors[name] = stored
    home = {name: stored.path.name for name, stored in tensors.items()}
    if listed is not None and home != listed:
        name = sorted(set(home.items()) ^ set(listed.items()))[0][0]
        raise SourceError(
            f"the index and the shards disagree about tensor {name!r}",
            where=index,
            expected=f"in {listed.get(name, 'no shard')}",
            got=f"in {home.get(name, 'no shard')}",
            next_step="download the model again",
        )
    return Weights(shards, tensors)


def shard_names(folder: Path) -> tuple[str, ...]:
    """Names of a folder's weight files, sorted; raises as `find_weights`."""
    if (index := folder / INDEX_NAME).exists():
        return listed_shards(index)
    if (folder / _SINGLE_NAME).exists():
        return (_SINGLE_NAME,)
    raise _no_weights(folder)


def listed_shards(index: Path) -> tuple[str, ...]:
    """Names of the files that an index spreads the weights over, sorted.

    Raises:
        SourceError: the index is damaged or points outside its folder.
    """
    return tuple(sorted(set(_read_index(index).values())))


def _no_weights(folder: Path) -> SourceError:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return PickledWeightsError(
            "the weights are pickled, and reading a pickle runs whatever code is in it",
            where=folder / pickles[0],
            expected="*.safetensors",
            next_step="use a revision of the model that has safetensors",
        )
    return SourceError(
        "the folder holds no weights",
        where=folder,
        expected=f"{_SINGLE_NAME} or {INDEX_NAME}",
        next_step="point at the folder of a transformers model",
    )


def _read_index(path: Path) -> dict[str, str]:
    told = read_json_object(path, SourceError).get("weight_map")
    listed: dict[str, str] = told if isinstance(told, dict) else {}
    if not listed or not all(isinstance(name, str) for name in listed.values()):
        raise SourceError("the index has no weight_map of tensor names to files", where=path)
    for shard in set(listed.values()):
        # A plain name cannot leave the folder; anything else is refused before it is opened.
        plain = PurePosixPath(shard).name == shard and "\\" not in shard
        if not plain or not shard.endswith(".safetensors"):
            raise SourceError(
                "the index points at something that is not a safetensors file of its folder",
                where=path,
                expected="plain names such as model-00001-of-00002.safetensors",
                got=repr(shard),
                next_step="do not use this checkpoint unless you trust who made it",
            )
    return listed


def contained(folder: Path, name: str) -> Path:
    """The path of a model's file, refused when a symbolic link leads it out of its model.

    The Hub's cache links `snapshots/<commit>/<file>` to `blobs/<hash>`; that is inside.
    """
    path = folder / name
    try:
        real, home = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:
        raise SourceError(
            "a file of the model is a symbolic link that leads nowhere", where=path, got=error
        ) from error
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(real.is_relative_to(root) for root in allowed):
        raise SourceError(
            "a file of the model is a symbolic link that leaves its folder",
            where=path,
            got=real,
            next_step="put the file itself into the folder",
        )
    if not real.is_file():
        raise SourceError(
            "a file of the model is missing, or is no plain file",
            where=path,
            next_step="download it again",
        )
    return path


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Where the tensors of a file lie, by name, after checking that it is whole."""
    # What safetensors lets pass is looked at here: a header of any size, and one name for two
    # tensors. It gives no offsets, and its slices map the whole file.
    with open_file(path, SourceError) as file:
        size = os.fstat(file.fileno()).st_size
        header_bytes = int.from_bytes(file.read(8), "little")
        if LARGEST_HEADER_BYTES < header_bytes <= size:
            raise SourceError(
                "a weight file is damaged: its header is larger than any model's",
                where=path,
                expected=f"at most {LARGEST_HEADER_BYTES:,} bytes",
                got=f"{header_bytes:,} bytes (file of {size:,} bytes)",
                next_step="download it again",
            )
        raw = file.read(min(header_bytes, size))

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise SourceError(f"a weight file names {name!r} twice in its header", where=path)
            found[name] = value
        return found

    try:
        with safe_open(path, framework="numpy"):
            header = json.loads(raw, object_pairs_hook=once)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise SourceError(
            "a weight file is truncated or damaged",
            where=path,
            got=f"{error} (file of {size:,} bytes)",
            next_step="download it again",
        ) from error
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        place, shape = 8 + header_bytes + start, tuple(entry["shape"])
        tensors[name] = StoredTensor(path, place, entry["dtype"], shape, end - start)
    return tensors


def sampled_digest(path: Path) -> str:
    """A SHA-256 over a weight file's size, its header and evenly spread blocks of its data.

    It identifies a shard in milliseconds whatever its size; it is no proof against someone who
    alters single bytes on purpose (for that, compare the whole file's hash).
    """
    size = path.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        digest.update(file.read(min(header_bytes, size)))
        start = file.tell()
        span = max(size - start - _SAMPLE_BYTES, 0)
        for block in range(_SAMPLE_BLOCKS):
            file.seek(start + span * block // (_SAMPLE_BLOCKS - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
