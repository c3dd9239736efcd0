"""A checkpoint, or a stock GGUF and a plan, as a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from converter.checkpoint.reader import open_checkpoint
from converter.common.errors import GgufError, SourceError, UsageError, refusing
from converter.common.files import check_file_absent, check_free_space, output_errors
from converter.engines.gguf import QUANTISED, TYPES
from converter.engines.gguf.architecture import (
    PATTERN,
    WINDOW,
    WINDOWED_ARCHS,
    WINDOWED_NAMES,
    cannot_honour,
    check_whole_layers,
    to_windowed_arch,
    window_keys,
)
from converter.engines.gguf.container import Container, read_container
from converter.engines.gguf.extra import check_installed, file_type, import_extra
from converter.engines.gguf.hybrid_file import HONOURED, own_keys
from converter.engines.gguf.process import quantise
from converter.engines.gguf.sizes import sizes_of
from converter.engines.gguf.stock import precision, stock_model
from converter.engines.gguf.tokenizer import tokenizer_keys
from converter.engines.gguf.writer import GgufModel, new_file, write_model
from converter.model.families.stock_gguf import number_of
from converter.model.mask import SLIDING
from converter.plan.plan import Plan


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        arch: the llama.cpp architecture.
        honoured: whether today's llama.cpp computes the plan from it.
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
        kind: one of `converter.engines.gguf.TYPES`; None keeps the checkpoint's own precision.
        stock_arch: write the architecture that ignores the plan today.

    Raises:
        CheckpointError: it is not a checkpoint of ours.
        PlanError: llama.cpp cannot honour its plan.
        SourceError: its weights or its tokenizer cannot be exported.
        GgufError: a package is missing, or llama.cpp's quantiser fails.
        OutputError: the file exists, or the disk is full.
    """
    import_extra("gguf")
    check_file_absent(file, force)
    if kind in QUANTISED:
        check_installed("llama_cpp")
    source, plan = open_checkpoint(checkpoint)
    written = precision(source)
    if kind is not None and kind not in QUANTISED:
        written = kind
    model = _with_plan(stock_model(source, written), plan, checkpoint, stock_arch=stock_arch)
    # The tokenizer comes last: it takes longest to check.
    with refusing("the tokenizer cannot be exported", source.folder, SourceError):
        tokenizer = tokenizer_keys(source)
    model = replace(model, general={**model.general, **tokenizer})
    with new_file(file, force=force) as partial:
        if kind is not None and kind in QUANTISED:
            _write_quantised(model, partial, file_type(kind))
        else:
            write_model(model, partial)
        source.files.check()
    return _exported(file, model, kind or written)


def retrofit(
    stock_file: Path, plan: Plan, file: Path, *, stock_arch: bool, force: bool
) -> Exported:
    """Give a stock GGUF a plan; the bytes of its tensors stay as they are.

    Raises:
        GgufError: the file is damaged, or of an architecture that is not known here.
        PlanError: the plan is for another depth, or llama.cpp cannot honour it.
        OutputError: the new file exists, or the disk is full.
    """
    import_extra("gguf")
    check_file_absent(file, force)
    container = read_container(stock_file)
    if file.exists() and stock_file.samefile(file):
        raise UsageError("the new file is the stock file", where=file)
    stock = _stock_of(container)
    plan.check_depth(number_of(stock.keys, "block_count") or 0, "--plan")
    plan.mask.check_fits(number_of(stock.keys, "context_length") or 0)
    model = _with_plan(stock, plan, stock_file, stock_arch=stock_arch)
    with new_file(file, force=force) as partial:
        write_model(model, partial)
    number = number_of(container.metadata, "general.file_type")
    kind = next((name for name in TYPES if file_type(name) == number), "unchanged")
    return _exported(file, model, kind)


def _with_plan(stock: GgufModel, plan: Plan, where: Path, *, stock_arch: bool) -> GgufModel:
    check_whole_layers(where, by_heads=plan.is_mixed)
    if not stock_arch:
        model = to_windowed_arch(stock, plan, where)
    elif plan.mask.is_bare:
        # The window keys that today's releases ignore.
        model = replace(stock, keys={**stock.keys, **window_keys(plan)})
    else:
        raise cannot_honour(f"no llama.cpp has this mask ({plan.mask})", where)
    # Without sliding layers, every architecture computes the plan.
    honoured = SLIDING not in plan.layer_types or model.arch in WINDOWED_NAMES
    own = own_keys(plan, stock.arch, honoured=honoured)
    return replace(model, general={**model.general, **own})


def _exported(file: Path, model: GgufModel, kind: str) -> Exported:
    honoured, size = model.general[HONOURED].value, file.stat().st_size
    return Exported(str(file), model.arch, honoured, size, kind, len(model.tensors))


def _stock_of(container: Container) -> GgufModel:
    """The model in a stock file that has no plan yet."""
    arch, keys = container.arch, container.own_keys()
    if arch not in WINDOWED_ARCHS:
        raise GgufError(
            "a GGUF of this architecture cannot be given a plan",
            where=container.path,
            expected=", ".join(WINDOWED_ARCHS),
            got=repr(arch),
            next_step="give the stock GGUF of the model"
            if arch in WINDOWED_NAMES
            else "export a checkpoint of a supported family: hybridize export OUT FILE.gguf",
        )
    if arch in WINDOWED_NAMES and WINDOW in keys:
        raise GgufError(
            "this GGUF has sliding layers already", where=container.path, got=f"{arch}.{WINDOW}"
        )
    # A file of the stock architecture may carry keys of an older plan.
    keys = {name: value for name, value in keys.items() if name not in (WINDOW, PATTERN)}
    if number_of(container.metadata, "split.count", 0) not in (0, 1):
        raise GgufError(
            "this GGUF is split into several files",
            where=container.path,
            next_step="merge them first, with llama.cpp's llama-gguf-split --merge",
        )
    sizes_of(container)
    # The new file gets these anew, or their truth ended with the old one.
    ended = (f"{arch}.", "hybridize.", "split.", "general.architecture", "general.alignment")
    general = {k: v for k, v in container.metadata.items() if not k.startswith(ended)}
    return GgufModel(arch, keys, general, container.tensors)


def _write_quantised(model: GgufModel, out: Path, file_type: int) -> None:
    """Write a model by way of a whole file, which llama.cpp quantises."""
    whole = out.with_name(f"{out.name}.whole")
    try:
        write_model(model, whole)
        with output_errors(out):
            # No type of the quantiser is larger than what it starts from.
            check_free_space(out.absolute().parent, whole.stat().st_size)
        quantise(whole, out, file_type)
    finally:
        whole.unlink(missing_ok=True)
    # The quantiser's word is not taken for it: a full disk must not pass as a file.
    read_container(out)
