"""The weight files of a model folder: found, checked and identified without loading them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError, safe_open

from converter.common.errors import PickledWeightsError, SourceError
from converter.common.files import read_json_object

INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# A sampled digest reads this many blocks of this many bytes, spread evenly over the file.
_SAMPLE_BLOCKS = 256
_SAMPLE_BYTES = 4096
# A header of 100,000 tensors takes some ten million bytes.
LARGEST_HEADER_BYTES = 32 << 20


@dataclass(frozen=True)
class Weights:
    """The weight files of a model.

    Attributes:
        shards: file names inside the folder, sorted.
        tensors: shape of every tensor by name.
        tensor_bytes: bytes of all tensors together.
    """

    shards: tuple[str, ...]
    tensors: Mapping[str, tuple[int, ...]]
    tensor_bytes: int


def find_weights(folder: Path) -> Weights:
    """Find a folder's safetensors and check that they are whole.

    Only headers are read, so the cost does not grow with the size of the weights.

    Raises:
        PickledWeightsError: there are only pickled weights.
        SourceError: there are none, a shard is missing or truncated, a tensor stands in two
            shards, or the index disagrees with the shards or points outside the folder.
    """
    index = folder / INDEX_NAME
    listed = _read_index(index) if index.exists() else None
    if listed is not None:
        shards = tuple(sorted(set(listed.values())))
    elif (folder / _SINGLE_NAME).exists():
        shards = (_SINGLE_NAME,)
    else:
        raise _no_weights(folder)
    tensors: dict[str, tuple[int, ...]] = {}
    home: dict[str, str] = {}
    total = 0
    for shard in shards:
        for name, shape, size in _read_header(contained(folder, shard)):
            if name in tensors:
                raise SourceError(
                    f"tensor {name!r} stands in two shards", where=f"{home[name]}, {shard}"
                )
            tensors[name], home[name] = shape, shard
            total += size
    if listed is not None and home != listed:
        name = sorted(set(home.items()) ^ set(listed.items()))[0][0]
        raise SourceError(
            f"the index and the shards disagree about tensor {name!r}",
            where=index,
            expected=f"in {listed.get(name, 'no shard')}",
            got=f"in {home.get(name, 'no shard')}",
            next_step="download the model again",
        )
    return Weights(shards, tensors, total)


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
    listed = read_json_object(path, SourceError).get("weight_map")
    if (
        not isinstance(listed, dict)
        or not listed
        or not all(isinstance(name, str) for name in listed.values())
    ):
        raise SourceError("the index has no weight_map of tensor names to files", where=path)
    for shard in set(listed.values()):
        # A plain name cannot leave the folder; anything else is refused before it is opened.
        if (
            PurePosixPath(shard).name != shard
            or "\\" in shard
            or not shard.endswith(".safetensors")
        ):
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


def _read_header(path: Path) -> list[tuple[str, tuple[int, ...], int]]:
    """Name, shape and bytes of each tensor of one file."""
    _check_names(path)
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return [
                (
                    name,
                    tuple(tensor.get_shape()),
                    math.prod(tensor.get_shape()) * _dtype_bits(tensor.get_dtype()) // 8,
                )
                for name, tensor in slices.items()
            ]
    except (SafetensorError, OSError) as error:
        raise SourceError(
            "a weight file is truncated or damaged",
            where=path,
            got=f"{error} (file of {path.stat().st_size:,} bytes)",
            next_step="download it again",
        ) from error


def _check_names(path: Path) -> None:
    """Refuse what safetensors lets pass: a header of any size, and one name for two tensors.

    Of overlapping, missing or badly sized tensors its own check is the better one.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if LARGEST_HEADER_BYTES < header_bytes <= size:
            raise SourceError(
                "a weight file is damaged: its header is larger than any model's",
                where=path,
                expected=f"at most {LARGEST_HEADER_BYTES:,} bytes",
                got=f"{header_bytes:,} bytes (file of {size:,} bytes)",
                next_step="download it again",
            )
        header = file.read(min(header_bytes, size))

    def pairs(found: list[tuple[str, object]]) -> dict[str, object]:
        if len(dict(found)) != len(found):
            names = [name for name, _ in found]
            twice = next(name for name in names if names.count(name) > 1)
            raise SourceError(f"a weight file names {twice!r} twice in its header", where=path)
        return dict(found)

    # What is not JSON is for safetensors to name.
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(header, object_pairs_hook=pairs)


def _dtype_bits(name: str) -> int:
    """Bits of one element from a safetensors dtype name such as BF16, F8_E4M3 or BOOL."""
    digits = "".join(c for c in name.split("_")[0] if c.isdigit())
    return int(digits) if digits else 8


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
