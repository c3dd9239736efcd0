"""Sources: found, checked, described and told apart without loading them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from converter.common.errors import CheckpointError, FamilyError, SourceError
from converter.model.source import SOURCE_CONFIG, open_source, source_inside
from tests.loopback_hub import serving
from tests.tiny import tiny_model


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_source_is_described(tmp_path: Path) -> None:
    source = open_source(str(tiny_model(tmp_path / "tiny")))
    assert (source.name, source.revision, source.family.title) == ("tiny", None, "Qwen3")
    assert source.folder == tmp_path / "tiny"
    assert source.shape.layers == 4
    assert source.weights.shards == ("model.safetensors",)


def test_a_source_is_named_by_its_folder_however_it_is_spelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path / "tiny")
    assert open_source(".").name == "tiny"
    assert open_source("../tiny/").name == "tiny"


def test_opening_a_source_loads_neither_torch_nor_transformers(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "tiny")
    program = (
        "import sys\nfrom converter.model.source import open_source\n"
        f"open_source({str(folder)!r}).fingerprint\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.decode().strip() == "[]"


def reordered(folder: Path) -> None:
    (folder / "README.md").write_text("# tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=4))


def flip_a_weight(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")


@pytest.mark.parametrize(
    ("change", "matters"),
    [
        (lambda folder: edit(folder, rms_norm_eps=1e-5), True),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), True),
        (lambda folder: (folder / "chat_template.jinja").write_text("x"), True),
        (flip_a_weight, True),
        (reordered, False),
        (lambda _: None, False),
    ],
    ids=["config", "tokenizer", "chat template", "weights", "card and order of keys", "nothing"],
)
def test_the_fingerprint_changes_with_what_results_depend_on(
    change: Callable[[Path], object], matters: bool, tmp_path: Path
) -> None:
    folder = tiny_model(tmp_path / "tiny")
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    change(copy)
    same = open_source(str(copy)).fingerprint == open_source(str(folder)).fingerprint
    assert same is not matters


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "tiny")
    edit(folder, quantization_config={"quant_method": "awq"})
    with pytest.raises(FamilyError, match="quantized"):
        open_source(str(folder))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layer_types", "full_attention"),
        ("sliding_window", 4.5),
        ("sliding_window", True),
        ("rope_parameters", [1.0]),
        ("rope_scaling", "linear"),
        ("rope_theta", "10000"),
    ],
)
def test_a_key_of_the_wrong_type_is_refused(key: str, value: object, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "tiny")
    edit(folder, **{key: value})
    with pytest.raises(SourceError, match=key):
        open_source(str(folder))


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "tiny")
    edit(folder, vocab_size=33)
    with pytest.raises(SourceError, match=r"model\.embed_tokens\.weight") as caught:
        open_source(str(folder))
    assert caught.value.details["expected"] == "shape [33, 16]"
    assert caught.value.details["got"] == "shape [32, 16]"


def test_a_revision_needs_a_hub_id(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="--revision"):
        open_source(str(tiny_model(tmp_path / "tiny")), revision="main")


def test_a_checkpoint_is_read_back_as_its_source(tmp_path: Path) -> None:
    """Its config.json is the hybrid's; the source's own lies in hybrid/."""
    folder = tiny_model(tmp_path / "tiny")
    outside = open_source(str(folder))
    (folder / "hybrid").mkdir()
    (folder / "config.json").rename(folder / SOURCE_CONFIG)
    (folder / "config.json").write_text('{"model_type": "hybrid_qwen3", "hybrid": {}}')
    manifest = {"source": {"name": "owner/name", "revision": "abc"}}
    (folder / "hybrid" / "manifest.json").write_text(json.dumps(manifest))
    inside = source_inside(folder)
    assert (inside.name, inside.revision) == ("owner/name", "abc")
    assert inside.config == outside.config
    assert inside.fingerprint == outside.fingerprint


@pytest.mark.parametrize("manifest", ["{}", '{"source": "tiny"}', '{"source": {"name": 3}}'])
def test_a_checkpoint_without_provenance_is_refused(manifest: str, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "tiny")
    (folder / "hybrid").mkdir()
    shutil.copy(folder / "config.json", folder / SOURCE_CONFIG)
    (folder / "hybrid" / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError, match="does not name the source"):
        source_inside(folder)


def test_a_folder_without_the_source_config_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a checkpoint written by hybridize"):
        source_inside(tiny_model(tmp_path / "tiny"))


def test_a_hub_without_the_model_and_a_hub_out_of_reach_are_told(tmp_path: Path) -> None:
    def inspected() -> str:
        done = subprocess.run(
            [sys.executable, "-m", "converter", "inspect", "owner/name"],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env={"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "NO_PROXY": "*"},
        )
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        return done.stderr

    with serving(tmp_path / "store") as hub:
        said = inspected()
        assert said.startswith("error: the Hub does not give this model\n  where: owner/name")
    said = inspected()
    assert said.startswith("error: the model is neither a local folder nor in the local Hub")
    assert "the network" in said
