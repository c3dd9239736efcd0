"""Loading from a Hub on loopback: only what is needed, can be used, and fits on the disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from converter.common.errors import OutputError, SourceError
from converter.model.source import open_source
from tests.conftest import run_cli
from tests.loopback_hub import Blob, Fault, LoopbackHub

# The Hub's client sends large files in a way that its HTTP library has come to dislike.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

BASE = "owner/original"


def publish_source(hub: LoopbackHub, folder: Path, **more: bytes) -> str:
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    extra = {
        "pytorch_model.bin": b"pickle",
        "consolidated.safetensors": b"other",
        "adapter.safetensors": b"other",
        "original/model.pth": b"pickle",
        "onnx/model.onnx": b"other",
        "README.md": b"---\nlicense: apache-2.0\n---\n",
    }
    return hub.create(BASE, {**files, **extra, **more})


def test_only_what_is_needed_is_downloaded(
    hub: LoopbackHub, sources: dict[str, Path], tmp_path: Path
) -> None:
    commit = publish_source(hub, sources["qwen2"])
    opened = open_source(BASE)
    assert (opened.name, opened.revision) == (BASE, commit)
    expected = {p.name for p in sources["qwen2"].iterdir()} | {"README.md"}
    assert {p.name for p in opened.folder.iterdir()} == expected
    assert hub.asked("GET", r"\.bin$|consolidated|adapter|[.]pth$|onnx") == 0
    # From the cache, without a request, by commit and by branch.
    hub.requests.clear()
    for revision in (commit, None):
        assert open_source(BASE, revision=revision, offline=True).folder == opened.folder
    assert hub.requests == []
    out = tmp_path / "out"
    for command in (
        ("convert", BASE, out, "--layers", "1", "--window", "16"),
        ("push", out, "me/hyb", "--no-verify"),
        ("retarget", out, "--layers", "2"),
    ):
        assert run_cli(*command, "-q") == 0
        card = (out / "README.md").read_text()
        assert f"base_model: {BASE}\n" in card and "license: apache-2.0\n" in card


def test_a_pinned_revision_is_the_one_that_is_converted(
    hub: LoopbackHub, sources: dict[str, Path]
) -> None:
    old = publish_source(hub, sources["llama"])
    hub.repositories[BASE].add("main", {**hub.tree(BASE), "config.json": Blob(b"{}")})
    assert open_source(BASE, revision=old).revision == old
    with pytest.raises(SourceError, match="not supported"):
        open_source(BASE)
    with pytest.raises(SourceError, match="does not give this model") as caught:
        open_source(BASE, revision="no-such-branch")
    assert "no such revision" in caught.value.details["got"]


INDEX = {"weight_map": {"model.norm.weight": "../../x.safetensors"}}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", {"model_type": "mamba"}, "not supported"),
        ("model.safetensors.index.json", INDEX, "not a safetensors file of its folder"),
    ],
)
def test_a_model_that_cannot_be_converted_costs_no_download(
    name: str, content: object, said: str, hub: LoopbackHub, sources: dict[str, Path]
) -> None:
    publish_source(hub, sources["llama"], **{name: json.dumps(content).encode()})
    with pytest.raises(SourceError, match=said):
        open_source(BASE)
    assert hub.asked("GET", "safetensors$") == 0


def test_a_disk_without_room_is_refused_before_the_download(
    hub: LoopbackHub, sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_source(hub, sources["llama"])
    usage = shutil.disk_usage(Path("/"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=16 << 20))
    with pytest.raises(OutputError, match="too little free space") as caught:
        open_source(BASE)
    assert "HF_HOME" in caught.value.details["next step"]
    assert hub.asked("GET", "safetensors$") == 0


def test_a_download_that_broke_goes_on(hub: LoopbackHub, sources: dict[str, Path]) -> None:
    publish_source(hub, sources["qwen2"])
    hub.faults = [Fault("GET", "model-00002.*safetensors$", 503)]
    opened = open_source(BASE)
    for shard in sorted(sources["qwen2"].glob("*.safetensors")):
        assert (opened.folder / shard.name).read_bytes() == shard.read_bytes()
