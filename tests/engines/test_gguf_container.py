"""GGUF files from strangers: read like the reference reads them, or refused, never believed."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.common.errors import GgufError
from converter.engines.gguf.container import read_container
from converter.engines.gguf.writer import GgufModel, constant, write_model
from converter.model.families.stock_gguf import Value, array, flag, integer, real, text

KEYS = {"block_count": integer(2), "scale": real(0.5), "pattern": array("bool", [True, False])}
GENERAL = {
    "general.name": text("naïve ▁"),
    "tokenizer.tokens": array("string", ["a", "", "ß"]),
    "tokenizer.scores": array("float32", [0.5, -1.0, 2.0]),
    "tokenizer.kinds": array("int32", [1, -2, 3]),
    "flag": flag(True),
    "long": Value("uint64", 1 << 40),
    "small": Value("int8", -3),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("container") / "small.gguf"
    tensors = (
        constant("first.weight", numpy.arange(5, dtype=numpy.float32)),
        constant("second.weight", -numpy.arange(40, dtype=numpy.float32)),
    )
    write_model(GgufModel("tiny", KEYS, GENERAL, tensors), path)
    return path


def test_what_is_written_is_read_back(small: Path) -> None:
    container = read_container(small)
    assert container.arch == "tiny"
    assert container.own_keys() == KEYS
    assert {name: container.metadata[name] for name in GENERAL} == GENERAL
    assert [tensor.shape for tensor in container.tensors] == [(5,), (40,)]
    values = numpy.fromfile(small, numpy.float32, 40, offset=container.tensors[1].start)
    assert values.tolist() == (-numpy.arange(40)).tolist()


def test_the_reference_reader_reads_the_same(small: Path) -> None:
    reader, container = gguf.GGUFReader(small), read_container(small)
    for key, value in container.metadata.items():
        assert reader.fields[key].contents() == value.value or value.kind == "float32"
    for ours, theirs in zip(container.tensors, reader.tensors, strict=True):
        found = (theirs.name, theirs.data_offset, theirs.n_bytes)
        assert (ours.name, ours.start, ours.bytes) == found
        assert list(ours.shape) == theirs.shape.tolist()[::-1]


def test_every_truncation_is_refused(small: Path, tmp_path: Path) -> None:
    # Only the padding after the last tensor may be missing.
    whole, path, last = small.read_bytes(), tmp_path / "cut.gguf", read_container(small).tensors[-1]
    for length in range(last.start + last.bytes):
        path.write_bytes(whole[:length])
        with pytest.raises(GgufError):
            read_container(path)


@given(st.integers(0, 600), st.integers(0, 255))
def test_a_changed_byte_is_refused_or_harmless(
    small: Path, tmp_path_factory: pytest.TempPathFactory, place: int, value: int
) -> None:
    data = bytearray(small.read_bytes())
    data[place % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    path.write_bytes(data)
    try:
        container = read_container(path)
    except GgufError as error:
        assert error.details["where"] == str(path)
    else:
        for tensor in container.tensors:
            assert tensor.start >= 0 and tensor.start + tensor.bytes <= len(data)


def forged(*parts: bytes, keys: int = 0, tensors: int = 0) -> bytes:
    """A file that promises so many keys and tensors."""
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + b"".join(parts)


def entry(key: str, number: int, form: str, *values: int) -> bytes:
    name = struct.pack("<Q", len(key)) + key.encode()
    return name + struct.pack("<I" + form, number, *values)


def tensor(form: str, *values: int) -> bytes:
    return struct.pack("<Q", 1) + b"t" + struct.pack("<" + form, *values)


ARCH = entry("general.architecture", 8, "Q", 4) + b"tiny"
FORGED = {
    "a count of keys beyond the file": forged(keys=1 << 60),
    "a count of tensors beyond the file": forged(tensors=1 << 60),
    "a text beyond the file": forged(struct.pack("<Q", 1 << 62), keys=1),
    "an array beyond the file": forged(entry("a", 9, "IQ", 4, 1 << 61), keys=1),
    "texts beyond the file": forged(entry("a", 9, "IQ", 8, 1 << 61), keys=1),
    "an array of arrays": forged(entry("a", 9, "IQ", 9, 1), keys=1),
    "a key twice": forged(ARCH, ARCH, keys=2),
    "no architecture": forged(entry("a", 4, "I", 1), keys=1),
    "text that is not UTF-8": forged(entry("a", 8, "Q", 2), b"\xff\xfe", keys=1),
    "an alignment of three": forged(ARCH, entry("general.alignment", 4, "I", 3), keys=2),
    "an unknown type": forged(entry("a", 99, "Q", 0), keys=1),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "the first version": b"GGUF" + struct.pack("<III", 1, 0, 0) + b"\0" * 16,
    "not GGUF": b"PK\3\4" + b"\0" * 40,
    "empty": b"",
    "a tensor of 2^124 values": forged(
        ARCH, tensor("IQQIQ", 2, 1 << 62, 1 << 62, 0, 0), keys=1, tensors=1
    ),
    "a tensor of no dimension": forged(ARCH, tensor("IIQ", 0, 0, 0), keys=1, tensors=1),
    "a tensor of an unknown type": forged(ARCH, tensor("IQIQ", 1, 4, 99, 0), keys=1, tensors=1),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_files_are_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "forged.gguf"
    path.write_bytes(FORGED[case])
    with pytest.raises(GgufError):
        read_container(path)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (entry("a", 9, "IQ", 0, 5_000_000), "more than 4,194,304 entries"),
        (entry("a", 8, "Q", 130 << 20), "more than 134,217,728 bytes"),
    ],
    ids=["entries", "bytes"],
)
def test_metadata_larger_than_any_models_is_refused(
    head: bytes, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "large.gguf"
    path.write_bytes(forged(head, keys=1))
    with path.open("ab") as file:
        file.truncate(140 << 20)
    with pytest.raises(GgufError) as caught:
        read_container(path)
    assert words in caught.value.details["got"]


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(GgufError) as caught:
            read_container(path)
        assert caught.value.details["where"] == str(path)
