"""Weight files found, checked and told apart without loading them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from converter.common.errors import SourceError
from converter.model.weights import INDEX_NAME, contained, find_weights, sampled_digest

A = numpy.zeros((3, 5), numpy.float32)
B = numpy.zeros((7,), numpy.float16)


def shard(folder: Path, name: str, **tensors: numpy.ndarray) -> Path:
    save_file(tensors, folder / name)
    return folder / name


def index(folder: Path, **files: str) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": files}))


def test_a_single_file_is_found(tmp_path: Path) -> None:
    # Pickles beside it are passed over.
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    shard(tmp_path, "model.safetensors", a=A, b=B)
    weights = find_weights(tmp_path)
    assert weights.shards == ("model.safetensors",)
    assert weights.shapes == {"a": (3, 5), "b": (7,)}
    assert weights.tensor_bytes == 3 * 5 * 4 + 7 * 2


def test_the_shards_of_an_index_are_found(tmp_path: Path) -> None:
    shard(tmp_path, "model-2.safetensors", b=B)
    shard(tmp_path, "model-1.safetensors", a=A)
    shard(tmp_path, "unlisted.safetensors", c=A)
    index(tmp_path, a="model-1.safetensors", b="model-2.safetensors")
    weights = find_weights(tmp_path)
    assert weights.shards == ("model-1.safetensors", "model-2.safetensors")
    assert set(weights.tensors) == {"a", "b"}


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int8", "bool", "uint16"])
def test_bytes_are_those_of_the_arrays(dtype: str, tmp_path: Path) -> None:
    array = numpy.zeros((4, 3), dtype)
    shard(tmp_path, "model.safetensors", a=array)
    assert find_weights(tmp_path).tensor_bytes == array.nbytes


def test_eight_bit_floats_are_counted_as_one_byte(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [6], "data_offsets": [0, 6]}}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(6)
    (tmp_path / "model.safetensors").write_bytes(content)
    assert find_weights(tmp_path).tensor_bytes == 6


@pytest.mark.parametrize(
    "name",
    [
        *("../a.safetensors", "/etc/a.safetensors", "sub/a.safetensors", "..\\a.safetensors"),
        *("..", "", "a.bin", "./a.safetensors", "a.safetensors/"),
    ],
)
def test_an_index_names_files_of_its_folder_only(name: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for folder in (tmp_path, tmp_path / "sub", tmp_path.parent):
        shard(folder, "a.safetensors", a=A)
    index(tmp_path, a=name)
    with pytest.raises(SourceError, match="points at something"):
        find_weights(tmp_path)


@pytest.mark.parametrize(
    ("listed", "tensor", "expected", "got"),
    [
        ("a", "b", "in no shard", "in one.safetensors"),
        ("abc", "c", "in one.safetensors", "in no shard"),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(
    listed: str, tensor: str, expected: str, got: str, tmp_path: Path
) -> None:
    shard(tmp_path, "one.safetensors", a=A, b=B)
    index(tmp_path, **dict.fromkeys(listed, "one.safetensors"))
    with pytest.raises(SourceError, match=f"disagree about tensor '{tensor}'") as caught:
        find_weights(tmp_path)
    assert (caught.value.details["expected"], caught.value.details["got"]) == (expected, got)


@pytest.mark.parametrize("cut", [1, 8, 40, 59])
def test_a_file_that_lost_bytes_is_refused(cut: int, tmp_path: Path) -> None:
    path = shard(tmp_path, "model.safetensors", a=A)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(SourceError, match="truncated or damaged"):
        find_weights(tmp_path)


def hub_cache(root: Path) -> Path:
    """A snapshot as the Hub's client lays it out."""
    snapshot, blobs = root / "models--o--n" / "snapshots" / "abc", root / "models--o--n" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    shard(blobs, "hash", a=A)
    (snapshot / "model.safetensors").symlink_to("../../blobs/hash")
    return snapshot


def test_links_inside_the_folder_and_those_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    shard(tmp_path, "real.safetensors", a=A)
    (tmp_path / "model.safetensors").symlink_to("real.safetensors")
    for folder in (tmp_path, hub_cache(tmp_path)):
        assert find_weights(folder).shapes == {"a": (3, 5)}


@pytest.mark.parametrize("target", ["../../../elsewhere", "../../blobs/../elsewhere", "../other/a"])
def test_other_links_out_of_a_snapshot_are_refused(target: str, tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    (snapshot / ".." / "other").mkdir()
    for place in (tmp_path / "elsewhere", snapshot.parent.parent / "elsewhere"):
        shutil.copy(snapshot / "model.safetensors", place)
    shutil.copy(snapshot / "model.safetensors", snapshot.parent / "other" / "a")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(target)
    with pytest.raises(SourceError, match="leaves its folder"):
        find_weights(snapshot)


def test_a_folder_that_is_itself_a_link_is_no_way_out(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    shard(tmp_path / "real", "model.safetensors", a=A)
    (tmp_path / "link").symlink_to("real")
    assert contained(tmp_path / "link", "model.safetensors").is_file()


def test_a_digest_tells_weights_apart(tmp_path: Path) -> None:
    """By size, header and every sampled block; the same bytes give the same digest."""
    rows = numpy.arange(500_000, dtype=numpy.float32)
    first = sampled_digest(shard(tmp_path, "1", a=rows))
    assert sampled_digest(shard(tmp_path, "2", a=rows)) == first
    assert sampled_digest(shard(tmp_path, "3", b=rows)) != first
    ends = [rows + (numpy.arange(rows.size) == place) for place in (0, rows.size - 1)]
    for other in (rows[:-1], rows + 1, *ends):
        assert sampled_digest(shard(tmp_path, "4", a=other.astype(rows.dtype))) != first


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 5000])
def test_a_digest_of_a_short_file_covers_all_of_it(size: int, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(size))
    first = sampled_digest(path)
    path.write_bytes(bytes(size + 1))
    assert sampled_digest(path) != first
    if size > 8:
        path.write_bytes(bytes(size - 1) + b"\1")
        assert sampled_digest(path) != first
