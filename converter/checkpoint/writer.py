"""Writing a checkpoint: weights linked, configuration edited, provenance recorded."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from converter import __version__
from converter.checkpoint.format import (
    MANIFEST_FILE,
    PLAN_FILE,
    SOURCE_CONFIG,
    format_of,
    render_code,
    render_config,
)
from converter.checkpoint.reader import file_record, present_files
from converter.common.errors import OutputError, SourceError
from converter.common.files import (
    check_absent,
    check_free_space,
    is_empty_folder,
    link_or_copy,
    output_errors,
    read_json_object,
    restore_replaced,
    write_bytes,
    write_json,
    write_text,
)
from converter.model.source import Source
from converter.model.weights import INDEX_NAME, contained
from converter.plan.plan import Plan, kv_bytes

# Small files that a checkpoint takes from its source, byte for byte.
_CARRIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
_GENERATION = "generation_config.json"
_MANIFEST_VERSION = 1
_VERSIONED = ("torch", "transformers", "safetensors", "huggingface-hub")


def carried_files(source: Source) -> list[str]:
    """Names of the small files that a checkpoint takes from its source, sorted."""
    found = {path for pattern in _CARRIED for path in source.folder.glob(pattern)}
    return sorted(p.relative_to(source.folder).as_posix() for p in found if p.is_file())


def write_model(
    source: Source, plan: Plan, folder: Path, *, symlink: bool = False, copy: bool = False
) -> dict[str, str]:
    """Write the part of a checkpoint that engines load, into an existing empty folder.

    `symlink` points at the weights instead of linking them, for a folder that will not outlive the
    source: it never copies, whatever disk the folder is on. `copy` shares no file with the source.

    Returns:
        How each shard got there.

    Raises:
        OutputError: the disk is full or may not be written to.
    """
    links = {}
    for shard in source.weights.shards:
        original = contained(source.folder, shard)
        if symlink:
            (folder / shard).symlink_to(original.resolve())
        else:
            links[shard] = link_or_copy(original, folder / shard, copy=copy)
    carried = carried_files(source)
    if (source.folder / INDEX_NAME).exists():
        carried.append(INDEX_NAME)
    check_free_space(folder, sum((source.folder / name).stat().st_size for name in carried))
    for name in carried:
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        # A copy, not a link: tools that save over a checkpoint would write into the source.
        shutil.copyfile(contained(source.folder, name), target)
    if (source.folder / _GENERATION).is_file():
        original = contained(source.folder, _GENERATION)
        generation = read_json_object(original, SourceError)
        if "cache_implementation" in generation:
            # A cache chosen for full attention would be refused by, or wrong for, a hybrid.
            del generation["cache_implementation"]
            write_json(folder / _GENERATION, generation)
        else:
            shutil.copyfile(original, folder / _GENERATION)
    write_json(folder / "config.json", render_config(source, plan))
    for name, text in render_code(format_of(source, plan.mask)).items():
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


def plan_json(plan: Plan, source: Source) -> dict[str, Any]:
    """A plan with what it costs at the model's full context."""
    return plan.to_json() | {"kv_bytes": kv_bytes(plan, source.shape, source.shape.context_tokens)}
