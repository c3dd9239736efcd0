"""A checkpoint, or a stock GGUF and a plan, as a GGUF file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from converter.checkpoint.reader import open_checkpoint
from converter.common.errors import GgufError, PlanError, UsageError
from converter.common.files import check_file_absent, check_free_space, output_errors
from converter.engines.gguf.architecture import (
    HONOURING,
    HONOURING_ARCHS,
    PATTERN,
    WINDOW,
    GgufModel,
    cannot_honour,
    forward_compatible,
    to_windowed_arch,
)
from converter.engines.gguf.container import Container, read_container
from converter.engines.gguf.extra import import_gguf, import_llama_cpp
from converter.engines.gguf.metadata import QUANTISED, WRITTEN, general_keys, own_keys
from converter.engines.gguf.process import ask
from converter.engines.gguf.stock import precision, stock_model
from converter.engines.gguf.tokenizer import tokenizer_keys
from converter.engines.gguf.writer import new_file, write_model
from converter.model.families.gguf_values import number_of
from converter.model.mask import SLIDING
from converter.plan.plan import Plan

TYPES = (*WRITTEN, *QUANTISED)
# Keys that the new file gets anew, or whose truth ended with the old one.
_REPLACED = ("general.architecture", "general.alignment")


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        file: its name.
        arch: the llama.cpp architecture.
        honoured: whether today's llama.cpp computes the plan from it.
        bytes: its size.
        type: of the matrices.
        tensors: how many there are.
    """

    file: str
    arch: str
    honoured: bool
    bytes: int
    type: str
    tensors: int


def export(
    checkpoint: Path, file: Path, kind: str | None, *, stock_arch: bool, force: bool
) -> Exported:
    """Write a checkpoint of ours as GGUF.

    Args:
        checkpoint: the folder.
        file: what to write.
        kind: one of `TYPES`; None keeps the checkpoint's own precision.
        stock_arch: write the architecture that ignores the plan today.
        force: replace what is there.

    Raises:
        CheckpointError: it is not a checkpoint of ours.
        PlanError: llama.cpp cannot honour its plan.
        SourceError: its weights or its tokenizer cannot be exported.
        GgufError: a package is missing, or llama.cpp's quantiser fails.
        OutputError: the file exists, or the disk is full.
    """
    import_gguf()
    check_file_absent(file, force)
    if kind in QUANTISED:
        import_llama_cpp()
    source, plan = open_checkpoint(checkpoint)
    exact = precision(source)
    written = exact if kind is None or kind in QUANTISED else kind
    stock = stock_model(source, written, general_keys(source, written))
    model = _with_plan(stock, plan, checkpoint, stock_arch=stock_arch)
    # The tokenizer comes last: it takes longest to check.
    model = replace(model, general={**model.general, **tokenizer_keys(source)})
    with new_file(file, force=force) as partial:
        if kind in QUANTISED:
            with _beside(partial) as whole:
                tensors = write_model(model, whole)
                _quantise(whole, partial, kind)
        else:
            tensors = write_model(model, partial)
    return _exported(file, model, plan, kind or written, tensors)


def retrofit(
    stock_file: Path, plan: Plan, file: Path, *, stock_arch: bool, force: bool
) -> Exported:
    """Give a stock GGUF a plan; the bytes of its tensors stay as they are.

    Raises:
        GgufError: the file is damaged, or of an architecture that is not known here.
        PlanError: the plan is for another depth, or llama.cpp cannot honour it.
        OutputError: the new file exists, or the disk is full.
    """
    import_gguf()
    check_file_absent(file, force)
    container = read_container(stock_file)
    if _same_file(stock_file, file):
        raise UsageError("the new file is the stock file", where=file)
    stock = _stock_of(container)
    layers = number_of(stock.keys, "block_count")
    if layers != len(plan.layer_types):
        raise PlanError(
            "the plan is for a model of another depth",
            where="--plan",
            expected=f"{layers} layers",
            got=len(plan.layer_types),
        )
    plan.mask.check_fits(number_of(stock.keys, "context_length") or 0)
    model = _with_plan(stock, plan, stock_file, stock_arch=stock_arch)
    with new_file(file, force=force) as partial:
        tensors = write_model(model, partial)
    return _exported(file, model, plan, _type_of(container), tensors)


def _with_plan(stock: GgufModel, plan: Plan, where: Path, *, stock_arch: bool) -> GgufModel:
    if stock_arch:
        if not plan.mask.is_bare:
            raise cannot_honour(f"no llama.cpp has this mask ({plan.mask})", where)
        model = forward_compatible(stock, plan)
    else:
        model = to_windowed_arch(stock, plan, where)
    honoured = _honoured(model, plan)
    return replace(
        model, general={**model.general, **own_keys(plan, stock.arch, honoured=honoured)}
    )


def _honoured(model: GgufModel, plan: Plan) -> bool:
    """Whether today's llama.cpp computes the plan: always when no layer slides."""
    return SLIDING not in plan.layer_types or model.arch in HONOURING_ARCHS


def _exported(file: Path, model: GgufModel, plan: Plan, kind: str, tensors: int) -> Exported:
    return Exported(
        str(file), model.arch, _honoured(model, plan), file.stat().st_size, kind, tensors
    )


def _stock_of(container: Container) -> GgufModel:
    """The model in a stock file.

    Raises:
        GgufError: its architecture is not one that can be dressed, or it has a plan already.
    """
    arch, keys = container.arch, container.own_keys()
    if arch not in HONOURING:
        raise GgufError(
            "a GGUF of this architecture cannot be given a plan",
            where=container.path,
            expected=", ".join(HONOURING),
            got=repr(arch),
            next_step="give the stock GGUF of the model"
            if arch in HONOURING_ARCHS
            else "export a checkpoint of a supported family: hybridize export OUT FILE.gguf",
        )
    if arch in HONOURING_ARCHS and WINDOW in keys:
        raise GgufError(
            "this GGUF has sliding layers already", where=container.path, got=f"{arch}.{WINDOW}"
        )
    # A file of the forward-compatible form carries keys of an older plan.
    keys = {name: value for name, value in keys.items() if name not in (WINDOW, PATTERN)}
    general = {
        key: value
        for key, value in container.metadata.items()
        if not key.startswith((f"{arch}.", "hybridize.", "split.")) and key not in _REPLACED
    }
    for name in ("block_count", "embedding_length", "attention.head_count"):
        if not number_of(keys, name):
            raise GgufError(
                "the GGUF lacks a size",
                where=container.path,
                expected=f"one number in {arch}.{name}",
                got=keys[name].value if name in keys else None,
            )
    if number_of(container.metadata, "split.count", 0) not in (0, 1):
        raise GgufError(
            "this GGUF is split into several files",
            where=container.path,
            next_step="merge them first, with llama.cpp's llama-gguf-split --merge",
        )
    if not any(tensor.name == "token_embd.weight" for tensor in container.tensors):
        raise GgufError("this GGUF holds no model", where=container.path)
    return GgufModel(arch, keys, general, container.copied())


def _type_of(container: Container) -> str:
    """The name of a file's type, where it says one that we know."""
    number = number_of(container.metadata, "general.file_type")
    names = {value: name for name, value in {**WRITTEN, **QUANTISED}.items()}
    return names.get(number, "unchanged") if number is not None else "unchanged"


def _same_file(left: Path, right: Path) -> bool:
    return right.exists() and left.samefile(right)


@contextmanager
def _beside(partial: Path) -> Iterator[Path]:
    """A name for the unquantised file, which is removed in the end."""
    whole = partial.with_name(f"{partial.name}.whole")
    try:
        yield whole
    finally:
        whole.unlink(missing_ok=True)


def _quantise(whole: Path, out: Path, kind: str) -> None:
    with output_errors(out):
        # No type of the quantiser is larger than what it starts from.
        check_free_space(out.absolute().parent, whole.stat().st_size)
    names = {"file": os.fspath(whole.absolute()), "out": os.fspath(out.absolute())}
    ask("quantise", {**names, "file_type": QUANTISED[kind]})
    # The quantiser's word is not taken for it: a full disk must not pass as a file.
    read_container(out)
