"""Opening a checkpoint: its source and plan, or what is missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from converter.checkpoint.format import MANIFEST_FILE, PLAN_FILE, SOURCE_CONFIG
from converter.checkpoint.reader import open_checkpoint, scores_inside, source_inside
from converter.checkpoint.verify.static import static_checks
from converter.common.errors import CheckpointError
from converter.model.source import open_source
from tests.tiny import tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with the source's config where a checkpoint has it."""
    made = tiny_model(tmp_path / "tiny")
    (made / "hybrid").mkdir()
    shutil.copy(made / "config.json", made / SOURCE_CONFIG)
    return made


def test_a_checkpoint_is_read_back_as_its_source(folder: Path) -> None:
    """Its config.json is the hybrid's; the source's own lies in hybrid/."""
    outside = open_source(str(folder))
    fingerprint = outside.fingerprint
    (folder / "config.json").write_text('{"model_type": "hybrid_qwen3", "hybrid": {}}')
    manifest = {"source": {"name": "owner/name", "revision": "abc"}}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    inside = source_inside(folder)
    assert (inside.name, inside.revision) == ("owner/name", "abc")
    assert inside.config == outside.config
    assert inside.fingerprint == fingerprint


@pytest.mark.parametrize("manifest", ["{}", '{"source": "tiny"}', '{"source": {"name": 3}}'])
def test_a_checkpoint_without_provenance_is_refused(manifest: str, folder: Path) -> None:
    (folder / MANIFEST_FILE).write_text(manifest)
    with pytest.raises(CheckpointError, match="does not name the source"):
        source_inside(folder)


def test_the_first_version_of_each_format_is_read(checkpoint: Callable[..., Path]) -> None:
    """Checkpoints are out there with these stamps; a new version must go on reading them."""
    folder = checkpoint("qwen3", "plain")
    names = (PLAN_FILE, MANIFEST_FILE, "config.json")
    stamped = [json.loads((folder / name).read_text()) for name in names]
    stamped[-1] = stamped[-1]["hybrid"]
    assert [one["format_version"] for one in stamped] == [1, 1, 1]
    source, plan = open_checkpoint(folder)
    assert all(check.ok for check in static_checks(folder, source, plan, None))
    assert scores_inside(folder) is None
