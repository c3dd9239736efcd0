"""What can be checked of a checkpoint without running it: files, configuration, code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from converter.checkpoint.format import CARD_FILE, SOURCE_CONFIG, render_config
from converter.checkpoint.reader import file_record, present_files, read_manifest, stale_code
from converter.checkpoint.verify.report import Check, names_check
from converter.checkpoint.writer import carried_files, edited
from converter.common.errors import CheckpointError
from converter.common.files import read_json_object, sha256_of
from converter.model.families.base import TRANSFORMERS_BACKEND
from converter.model.source import Source
from converter.plan.plan import Plan


def static_checks(
    folder: Path, source: Source, plan: Plan, against: Source | None
) -> Iterator[Check]:
    """Every check of a checkpoint, the source inside it and its plan that needs no model.

    `against` is the model it was made from, when the user has it.
    """
    recorded, present = read_manifest(folder)["files"], present_files(folder)
    yield names_check("files present", recorded.keys() - present, "all", "the manifest's")
    yield names_check("no other files", present - recorded.keys(), "none", "none")
    changed = [
        name
        # The card is the user's to edit.
        for name in (recorded.keys() & present) - {str(CARD_FILE)}
        # The whole hashes of weights are found while the model is run (see `WeightHashes`).
        if not file_record(folder / name, source.weights.shards).items() <= recorded[name].items()
    ]
    yield names_check("sizes and hashes", changed, f"{len(recorded)} files", "the manifest's")
    yield _config(folder, source, plan)
    stale, limit = stale_code(folder, source, plan), "rendered by this hybridize"
    yield names_check("Python files are this version's", stale, "identical", limit)
    if against is not None:
        yield from _same_source(folder, source, against)


def _config(folder: Path, source: Source, plan: Plan) -> Check:
    """config.json is what the source's and the plan make; that it works is proved by running it."""
    found = read_json_object(folder / "config.json", CheckpointError)
    expected = render_config(source, plan)
    # The version of the tool is provenance, not behaviour.
    if isinstance(hybrid := found.get("hybrid"), dict):
        expected["hybrid"]["tool_version"] = hybrid.get("tool_version")
    # Earlier versions named the source's class; it computes the same, but vLLM refuses it.
    former = [f"{source.family.base_class}ForCausalLM"]
    if expected["architectures"] == [TRANSFORMERS_BACKEND] and found.get("architectures") == former:
        expected["architectures"] = former
    keys = found.keys() | expected.keys()
    wrong = [key for key in keys if not _same_json(found.get(key), expected.get(key))]
    return names_check("config.json says the plan", wrong, "as planned", "plan.json")


def _same_source(folder: Path, inside: Source, against: Source) -> Iterator[Check]:
    """The checkpoint holds the config and tokenizer of the model it is held against."""
    same = _same_json(inside.config, against.config)
    told = "identical" if same else "another config"
    yield Check("made from the given source's config", same, told, str(SOURCE_CONFIG))
    altered = [
        name
        for name in carried_files(against.folder)
        if not (folder / name).is_file() or not _is_carried(folder, against.folder, name)
    ]
    what = "tokenizer and licence are the source's"
    yield names_check(what, altered, "identical", "byte by byte")


def _is_carried(folder: Path, source: Path, name: str) -> bool:
    """Whether a checkpoint's file is what it takes from the source's."""
    if (content := edited(source, name)) is not None:
        return _same_json(read_json_object(folder / name, CheckpointError), content)
    return _same_bytes(folder / name, source / name)


def _same_json(left: object, right: object) -> bool:
    """Whether two values have the same JSON, whatever the order of keys; 1 is not true."""
    return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


def _same_bytes(left: Path, right: Path) -> bool:
    """Whether two files have the same bytes; at once when they are the same file."""
    same_size = left.stat().st_size == right.stat().st_size
    return left.samefile(right) or (same_size and sha256_of(left) == sha256_of(right))
