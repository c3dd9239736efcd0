"""Reading a checkpoint without loading it: its source, its plan, its files and its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from converter.checkpoint.format import (
    CARD_FILE,
    MANIFEST_FILE,
    PLAN_FILE,
    SCORES_FILE,
    SOURCE_CONFIG,
    format_of_plan,
    render_code,
    render_config,
)
from converter.common.errors import CheckpointError, PlanError
from converter.common.files import read_file, read_json_object, sha256_of
from converter.model.source import Source, checked_source
from converter.model.weights import sampled_digest
from converter.plan.plan import Plan, load_plan

# Python, git and the Hub leave these beside what they read.
_LEFT_BY_OTHERS = {"__pycache__", ".cache", ".git", ".gitattributes"}


def open_checkpoint(folder: Path) -> tuple[Source, Plan]:
    """The source inside a checkpoint and its plan.

    Raises:
        CheckpointError: the folder is not a checkpoint of ours, or its plan does not fit it.
        SourceError: its weight files are damaged.
    """
    source = source_inside(folder)
    try:
        plan = load_plan(folder / PLAN_FILE)
    except PlanError as error:
        raise CheckpointError(f"the checkpoint's plan is damaged: {error}") from error
    try:
        plan.check_layers(source.shape, folder / PLAN_FILE)
    except PlanError as error:
        raise CheckpointError(
            "the checkpoint's plan does not fit its model",
            where=folder / PLAN_FILE,
            expected=error.details["expected"],
            got=error.details["got"],
        ) from error
    return source, plan


def source_inside(folder: Path) -> Source:
    """The source that a checkpoint was made from: its weights under the source's config.

    Raises:
        CheckpointError: the folder is not a checkpoint of ours.
        SourceError: its files are damaged.
    """
    path = folder / SOURCE_CONFIG
    if not path.is_file():
        raise CheckpointError(
            "this is not a checkpoint written by hybridize",
            where=folder,
            expected=f"a folder with {SOURCE_CONFIG}",
            next_step="make one with: hybridize convert SOURCE OUT",
        )
    origin = read_json_object(folder / MANIFEST_FILE, CheckpointError).get("source")
    if not isinstance(origin, dict) or not isinstance(origin.get("name"), str):
        raise CheckpointError("the manifest does not name the source", where=folder)
    config = read_json_object(path, CheckpointError)
    return checked_source(folder, origin["name"], origin.get("revision"), config)


def scores_inside(folder: Path) -> Path | None:
    """The scores that a checkpoint carries; None when it was not measured."""
    path = folder / SCORES_FILE
    return path if path.is_file() else None


def read_manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest, whose `files` are an object of records (see `file_record`).

    Raises:
        CheckpointError: it cannot be read, or lists no files.
    """
    path = folder / MANIFEST_FILE
    manifest = read_json_object(path, CheckpointError)
    recorded = manifest.get("files")
    if not isinstance(recorded, dict) or not all(isinstance(r, dict) for r in recorded.values()):
        raise CheckpointError("the manifest lists no files", where=path)
    return manifest


def edited_card(folder: Path, shards: tuple[str, ...]) -> str | None:
    """A checkpoint's card where somebody edited it; None where it is as we wrote it, or missing."""
    path, recorded = folder / CARD_FILE, read_manifest(folder)["files"].get(str(CARD_FILE))
    if not path.is_file() or file_record(path, shards) == recorded:
        return None
    return read_file(path, CheckpointError)


def present_files(folder: Path) -> set[str]:
    """Names of a checkpoint's files, but for the manifest and what tools leave beside them."""
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    ours = (file for file in files - {MANIFEST_FILE} if not _LEFT_BY_OTHERS & set(file.parts))
    return {file.as_posix() for file in ours}


def file_record(path: Path, shards: tuple[str, ...]) -> dict[str, Any]:
    """Size and hash of one file; shards have a sampled hash, so that writing needs no full read."""
    sampled = path.name in shards
    digest = {"sampled_sha256": sampled_digest(path)} if sampled else {"sha256": sha256_of(path)}
    return {"bytes": path.stat().st_size, **digest}


def stale_code(folder: Path, source: Source, plan: Plan) -> list[str]:
    """What could run that is not what this version of the tool writes for this plan.

    transformers looks for code in the files that `auto_map` names, at any depth and in other
    repositories, and in `custom_generate/`; so every Python file counts, every linked folder, and
    the `auto_map` itself.
    """
    expected = render_code(format_of_plan(source, plan))
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    found = {n for n, p in paths.items() if p.suffix == ".py" or (p.is_symlink() and p.is_dir())}
    stale = {
        name
        for name in found | expected.keys()
        if name not in found
        or name not in expected
        or paths[name].read_text(encoding="utf-8", errors="replace") != expected[name]
    }
    config = read_json_object(folder / "config.json", CheckpointError)
    if config.get("auto_map") != render_config(source, plan)["auto_map"]:
        stale.add("config.json (auto_map)")
    return sorted(stale)
