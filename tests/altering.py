"""Changes to a model's files under a run's feet."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from converter.model.weights import sampled_digest
from tests.conftest import make_model

WEIGHTS = "model.safetensors"
# Large enough that most of its bytes are in no sampled block.
_VOCABULARY = 12000
# Gaps between sampled blocks that are written to: embeddings of the tokens that examples are of.
_GAPS = 8


def large_model(folder: Path) -> Path:
    """A tiny model whose one weight file the sampled hash does not read whole."""
    return make_model(folder, "qwen3", vocab_size=_VOCABULARY)


def replace_weights(folder: Path) -> None:
    """Other weights under the same name, as a download does it."""
    path = folder / WEIGHTS
    other = path.with_suffix(".new")
    shutil.copyfile(path, other)
    _negate(other)
    other.replace(path)


def truncate_weights(folder: Path) -> None:
    """The second half is gone, in place."""
    path = folder / WEIGHTS
    os.truncate(path, path.stat().st_size // 2)


def alter_between_samples(folder: Path, *, forge: bool = False) -> None:
    """Other bytes in place, where the sampled hash does not look; with the old time, if forged."""
    path = folder / WEIGHTS
    before, digest = path.stat(), sampled_digest(path)
    _negate(path)
    assert sampled_digest(path) == digest
    if forge:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _negate(path: Path) -> None:
    """Change the signs of all float32 well inside some gaps between sampled blocks."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        span = size - start - 4096
        for block in range(_GAPS):
            begin, end = (span * i // 255 for i in (block, block + 1))
            first = (begin + 4096 + 3) // 4 * 4
            count = (end - first) // 4 * 4
            assert count > 64
            file.seek(start + first)
            values = bytearray(file.read(count))
            values[3::4] = bytes(byte ^ 0x80 for byte in values[3::4])
            file.seek(start + first)
            file.write(values)
