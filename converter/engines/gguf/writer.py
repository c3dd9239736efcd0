"""Writing a GGUF file tensor by tensor, a block of rows at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from converter.common.errors import OutputError
from converter.common.files import check_file_absent, check_free_space, output_errors, sync_folder
from converter.engines.gguf.architecture import GgufModel
from converter.engines.gguf.extra import import_gguf
from converter.model.families.gguf_values import Value

if TYPE_CHECKING:
    from gguf import GGUFWriter

_ALIGNMENT = 32


@contextmanager
def new_file(final: Path, *, force: bool) -> Iterator[Path]:
    """A temporary name beside `final` that becomes it when the body is done.

    Raises:
        OutputError: `final` exists and `force` is not set, or it cannot be written.
    """
    check_file_absent(final, force)
    partial = final.with_name(f".{final.name}.partial")
    with output_errors(final):
        try:
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(final)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync_folder(final.absolute().parent)


def write_model(model: GgufModel, path: Path) -> int:
    """Write a model to a file.

    A few megabytes of it are in memory at a time, whatever its size.

    Returns:
        How many tensors it has.

    Raises:
        OutputError: the disk is full or may not be written to.
    """
    gguf = import_gguf()
    padded = [-(-tensor.bytes // _ALIGNMENT) * _ALIGNMENT for tensor in model.tensors]
    with output_errors(path):
        check_free_space(path.absolute().parent, sum(padded))
        # The package writes the header; the data follows here, because it would take each tensor
        # whole.
        writer = gguf.GGUFWriter(path, model.arch)
        for key, value in _metadata(model).items():
            _add(writer, key, value)
        for tensor in model.tensors:
            kind = gguf.GGMLQuantizationType(tensor.type_number)
            byte_shape = (*tensor.shape[:-1], tensor.row_bytes)
            writer.add_tensor_info(tensor.name, byte_shape, _uint8(), tensor.bytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        with path.open("r+b") as file:
            file.seek(0, os.SEEK_END)
            file.write(bytes(-file.tell() % _ALIGNMENT))
            for tensor, size in zip(model.tensors, padded, strict=True):
                written = 0
                for block in tensor.blocks(1):
                    file.write(block.tobytes())
                    written += block.nbytes
                if written != tensor.bytes:
                    raise OutputError(
                        f"tensor {tensor.name!r} changed while it was read",
                        where=path,
                        expected=f"{tensor.bytes:,} bytes",
                        got=f"{written:,}",
                    )
                file.write(bytes(size - written))
    return len(model.tensors)


def _metadata(model: GgufModel) -> dict[str, Value]:
    """All keys but those that the package writes by itself."""
    own = {f"{model.arch}.{name}": value for name, value in model.keys.items()}
    skipped = ("general.architecture", "general.alignment")
    return {key: value for key, value in {**model.general, **own}.items() if key not in skipped}


def _add(writer: GGUFWriter, key: str, value: Value) -> None:
    import gguf

    if value.kind == "array" and not value.value:
        # GGUF has no empty arrays in this writer, and an absent key reads the same.
        return
    kinds = gguf.GGUFValueType
    item = None if value.item is None else kinds[value.item.upper()]
    writer.add_key_value(key, value.value, kinds[value.kind.upper()], sub_type=item)


def _uint8() -> object:
    import numpy

    return numpy.dtype(numpy.uint8)
