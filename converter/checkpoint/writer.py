"""Writing a checkpoint: weights linked, configuration edited, provenance recorded."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from converter import __version__
from converter.checkpoint.format import (
    MANIFEST_FILE,
    PLAN_FILE,
    SOURCE_CONFIG,
    format_of_plan,
    render_code,
    render_config,
)
from converter.checkpoint.reader import file_record, present_files
from converter.checkpoint.verify.report import Report
from converter.common.errors import OutputError, SourceError
from converter.common.files import (
    building,
    check_absent,
    check_free_space,
    finish_folder,
    is_empty_folder,
    link_or_copy,
    output_errors,
    read_json_object,
    restore_replaced,
    write_bytes,
    write_json,
    write_text,
)
from converter.model.code_keys import data_only
from converter.model.source import Source
from converter.model.weights import INDEX_NAME, contained
from converter.plan.plan import Plan, kv_bytes

# Small files that a checkpoint takes from its source, byte for byte.
_CARRIED = (
    "tokenizer*.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "*processor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
# Carried files that may name code, or a cache chosen for full attention, which would be refused by
# a hybrid or wrong for it.
_EDITED = (
    *("generation_config.json", "tokenizer_config.json", "processor_config.json"),
    *("preprocessor_config.json", "video_preprocessor_config.json"),
)
_CACHE = "cache_implementation"
_MANIFEST_VERSION = 1
_VERSIONED = ("torch", "transformers", "safetensors", "huggingface-hub")


def carried_files(folder: Path) -> list[str]:
    """Names of the small files that a checkpoint takes from its source's folder, sorted.

    A Python file is none of them, whatever its name.
    """
    found = {path for pattern in _CARRIED for path in folder.glob(pattern)}
    kept = (path for path in found if path.is_file() and path.suffix != ".py")
    return sorted(path.relative_to(folder).as_posix() for path in kept)


def edited(folder: Path, name: str) -> dict[str, Any] | None:
    """What a checkpoint says instead of a file that it carries; None for one taken as it is.

    Raises:
        SourceError: the file is not a JSON object, or leads out of the folder.
    """
    if name not in _EDITED:
        return None
    found = read_json_object(contained(folder, name), SourceError)
    kept = data_only(found, folder / name)
    kept.pop(_CACHE, None)
    return None if kept == found else kept


def carry_files(source: Path, folder: Path) -> None:
    """Copy the small files of a source's folder into another, without what names code."""
    for name in carried_files(source):
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        if (content := edited(source, name)) is not None:
            write_json(target, content)
        else:
            # A copy, not a link: tools that save over a checkpoint would write into the source.
            shutil.copyfile(contained(source, name), target)


def write_model(source: Source, plan: Plan, folder: Path, *, copy: bool = False) -> dict[str, str]:
    """Write the part of a checkpoint that engines load, into an existing empty folder.

    With `copy` it shares no file with the source.

    Returns:
        How each shard got there.

    Raises:
        OutputError: the disk is full or may not be written to.
    """
    links = {
        shard: link_or_copy(contained(source.folder, shard), folder / shard, copy=copy)
        for shard in source.weights.shards
    }
    small = [source.folder / name for name in carried_files(source.folder)]
    index = source.folder / INDEX_NAME
    check_free_space(folder, sum(path.stat().st_size for path in (*small, index) if path.exists()))
    if index.exists():
        shutil.copyfile(contained(source.folder, INDEX_NAME), folder / INDEX_NAME)
    carry_files(source.folder, folder)
    write_json(folder / "config.json", render_config(source, plan))
    for name, text in render_code(format_of_plan(source, plan)).items():
        write_text(folder / name, text)
    return links


def check_replaceable(source: Source, out: Path, *, force: bool) -> None:
    """Refuse an output that would cost the user something, before hours of work.

    Raises:
        OutputError: `out` holds the source, or exists and `force` is not set, or is a folder that
            this program did not write.
    """
    restore_replaced(out)
    home, target = source.folder.resolve(), out.resolve()
    if home != target and home.is_relative_to(target):
        raise OutputError("the output folder contains the source", where=out, got=source.folder)
    if target.is_relative_to(home) and home != target:
        raise OutputError(
            "the output folder lies inside the source",
            where=out,
            got=source.folder,
            next_step="write beside it: what copies or pushes the source would take it along",
        )
    check_absent(out, force)
    there = out.exists() or out.is_symlink()
    if there and not (out / MANIFEST_FILE).is_file() and not is_empty_folder(out):
        raise OutputError(
            "--force replaces checkpoints of ours only, and this is something else",
            where=out,
            next_step="choose another name, or remove it yourself",
        )


def fill(
    source: Source,
    plan: Plan,
    folder: Path,
    extras: Mapping[str, bytes],
    settings: Mapping[str, Any] | None,
    *,
    copy: bool,
) -> dict[str, str]:
    """Write a whole checkpoint into an empty folder.

    Nothing is loaded: the cost does not grow with the weights, as long as they can be linked.

    Args:
        source, plan: the model, and which layers slide.
        folder: where to write.
        extras: what else goes along, such as the card and the scores, by relative path.
        settings: all that the scores depend on, for the manifest; None without scores.
        copy: whether weights are copied where they could be linked.

    Returns:
        How each shard got there: `hard link`, `reflink` or `copy`.

    Raises:
        OutputError: the disk is full or may not be written to.
        SourceError: a file of the source changed since it was opened.
    """
    origin = {"name": source.name, "revision": source.revision, "fingerprint": source.fingerprint}
    with output_errors(folder):
        links = write_model(source, plan, folder, copy=copy)
        (folder / "hybrid").mkdir()
        write_json(folder / SOURCE_CONFIG, source.config)
        write_json(folder / PLAN_FILE, plan_json(plan, source))
        for name, content in extras.items():
            write_bytes(folder / name, content)
        records = {
            name: file_record(folder / name, source.weights.shards)
            for name in sorted(present_files(folder))
        }
        # Known where the model was measured; a conversion by a given plan reads no weights.
        for name, digest in ((settings or {}).get("weights") or {}).items():
            records[name]["sha256"] = digest
        manifest = {
            "format_version": _MANIFEST_VERSION,
            "tool": f"hybridize {__version__}",
            "versions": {name: version(name) for name in _VERSIONED},
            "source": origin,
            "settings": None if settings is None else dict(settings),
            "files": records,
        }
        write_json(folder / MANIFEST_FILE, manifest)
    # What was measured and is linked, or was copied, is what was opened.
    source.files.check()
    return links


def write_checkpoint(
    source: Source,
    plan: Plan,
    out: Path,
    extras: Mapping[str, bytes],
    settings: Mapping[str, Any] | None,
    *,
    copy: bool,
    force: bool,
    proof: Callable[[Path], Report] | None = None,
) -> tuple[Mapping[str, str], Report | None, Path]:
    """Write a checkpoint, and give it its name when it is proved.

    Args:
        source, plan, extras, settings, copy: as `fill` takes them.
        out: its name; `force` replaces a checkpoint that has it.
        proof: says whether a folder computes the plan; None proves nothing.

    Returns:
        How each shard got there, the proof, and where the checkpoint is: under a temporary name
        where its proof failed.

    Raises:
        OutputError, SourceError: as `check_replaceable` and `fill`.
    """
    check_replaceable(source, out, force=force)
    with building(out) as unfinished:
        links = fill(source, plan, unfinished, extras, settings, copy=copy)
        report = None if proof is None else proof(unfinished)
        proved = report is None or report.ok
        if proved:
            finish_folder(unfinished, out)
    return links, report, out if proved else unfinished


def plan_json(plan: Plan, source: Source) -> dict[str, Any]:
    """A plan with what it costs at the model's full context."""
    return plan.to_json() | {"kv_bytes": kv_bytes(plan, source.shape, source.shape.context_tokens)}
