"""What can be checked of a checkpoint without running it: files, configuration, code, weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from converter.checkpoint.format import MANIFEST_FILE, format_of, render_code, render_config
from converter.checkpoint.verify.report import Check
from converter.checkpoint.writer import (
    carried_files,
    file_record,
    present_files,
    recorded_files,
    same_json,
)
from converter.common.errors import CheckpointError
from converter.common.files import read_json_object, sha256_of
from converter.model.source import SOURCE_CONFIG, Source
from converter.plan.plan import Plan


def static_checks(
    folder: Path, source: Source, plan: Plan, against: Source | None
) -> Iterator[Check]:
    """Every check that needs no model.

    Args:
        folder: the checkpoint.
        source: the source inside it (its weights under the source's config).
        plan: its plan.
        against: the model it was made from, when the user has it.
    """
    yield from _files(folder, source)
    yield _config(folder, source, plan)
    yield _code(folder, source, plan)
    if against is not None:
        yield from _same_source(folder, source, against)


def _files(folder: Path, source: Source) -> Iterator[Check]:
    """Every file is the one the manifest describes, and there are no others."""
    manifest = read_json_object(folder / MANIFEST_FILE, CheckpointError)
    recorded, present = recorded_files(manifest, folder / MANIFEST_FILE), present_files(folder)
    missing, unknown = sorted(recorded.keys() - present), sorted(present - recorded.keys())
    yield Check("files present", not missing, ", ".join(missing) or "all", "the manifest's")
    yield Check("no other files", not unknown, ", ".join(unknown) or "none", "none")
    changed = [
        name
        for name in sorted(recorded.keys() & present)
        if file_record(folder / name, source.weights.shards) != recorded[name]
    ]
    yield Check(
        "sizes and hashes",
        not changed,
        ", ".join(changed) or f"{len(recorded)} files",
        "the manifest's",
    )


def _config(folder: Path, source: Source, plan: Plan) -> Check:
    """config.json is what the source's config and the plan make."""
    found = read_json_object(folder / "config.json", CheckpointError)
    expected = render_config(source, plan)
    # The version of the tool is provenance, not behaviour.
    expected["hybrid"]["tool_version"] = _tool_version(found)
    wrong = sorted(
        key for key in {*found, *expected} if not same_json(found.get(key), expected.get(key))
    )
    return Check(
        "config.json says the plan", not wrong, ", ".join(wrong) or "as planned", "plan.json"
    )


def _tool_version(config: dict[str, Any]) -> object:
    hybrid = config.get("hybrid")
    return hybrid.get("tool_version") if isinstance(hybrid, dict) else None


def _code(folder: Path, source: Source, plan: Plan) -> Check:
    stale = stale_code(folder, source, plan)
    return Check(
        "Python files are this version's",
        not stale,
        ", ".join(stale) or "identical",
        "rendered by this hybridize",
    )


def stale_code(folder: Path, source: Source, plan: Plan) -> list[str]:
    """Python files that are not what this version of the tool writes for this plan."""
    expected = render_code(format_of(source, plan.mask))
    found = {path.name for path in folder.glob("*.py")}
    return sorted(
        name
        for name in found | expected.keys()
        if name not in found
        or (folder / name).read_text(encoding="utf-8", errors="replace") != expected.get(name)
    )


def _same_source(folder: Path, inside: Source, against: Source) -> Iterator[Check]:
    """The checkpoint holds the weights and tokenizer of the model it is held against."""
    same_config = same_json(inside.config, against.config)
    yield Check(
        "made from the given source's config",
        same_config,
        "identical" if same_config else "another config",
        str(SOURCE_CONFIG),
    )
    different = [
        name
        for name in against.weights.shards
        if name not in inside.weights.shards
        or not _same_bytes(folder / name, against.folder / name)
    ]
    yield Check(
        "weights are the source's",
        not different,
        ", ".join(different) or "identical",
        "byte by byte",
    )
    altered = [
        name
        for name in carried_files(against)
        if not (folder / name).is_file()
        or sha256_of(folder / name) != sha256_of(against.folder / name)
    ]
    yield Check(
        "tokenizer and licence are the source's",
        not altered,
        ", ".join(altered) or "identical",
        "byte by byte",
    )


def _same_bytes(left: Path, right: Path) -> bool:
    """Whether two files have the same bytes; at once when they are the same file."""
    if left.samefile(right):
        return True
    return left.stat().st_size == right.stat().st_size and sha256_of(left) == sha256_of(right)
