"""What is loaded is what we write: nothing that names code, and no file that we did not choose."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from converter.checkpoint.format import format_of, render_code
from converter.checkpoint.private import private_hybrid, private_source, private_tokenizer, runnable
from converter.checkpoint.reader import open_checkpoint
from converter.common.errors import SourceError
from converter.model.mask import FULL, SLIDING, Mask
from converter.model.source import Source, open_source
from converter.plan.plan import Plan
from tests.checkpoint.test_verify import verdict
from tests.conftest import Folders, run_cli
from tests.hostile_code import names_of_code, plant
from tests.tiny import tiny_model

DATA = {"config.json", "model.safetensors", "tokenizer_config.json", "generation_config.json"}
DATA |= {"processor_config.json"}
CODE = {
    "attention_hybrid.py",
    "configuration_hybrid.py",
    "modeling_hybrid.py",
    "modeling_masks.py",
}


def planted(folder: Path) -> Source:
    """A tiny model of zeros with code in every place."""
    made = tiny_model(folder)
    (made / "tokenizer_config.json").write_text("{}")
    plant(made, "evil")
    return open_source(str(made))


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def names_in(folder: Path) -> set[str]:
    """Keys of all JSON files at their top, and the texts in which the code would be named."""
    found: set[str] = set()
    for path in folder.glob("*.json"):
        assert "evil" not in path.read_text(), path
        found |= json.loads(path.read_text()).keys()
    return found


def plan_of(source: Source, sinks: int) -> Plan:
    kinds = (FULL, *(SLIDING,) * (source.shape.layers - 1))
    return Plan(kinds, Mask(4, sinks), "layers", None, None, source.name, None)


def test_a_private_folder_holds_what_we_write_and_no_more(tmp_path: Path) -> None:
    source = planted(tmp_path / "model")
    with private_source(source) as folder:
        assert files(folder) == DATA
        assert not names_in(folder) & names_of_code("").keys()
        assert (folder / "model.safetensors").samefile(source.folder / "model.safetensors")
    with private_tokenizer(source.folder) as folder:
        assert files(folder) == DATA - {"model.safetensors"}
        assert not names_in(folder) & names_of_code("").keys()
    with private_hybrid(source, plan_of(source, sinks=2)) as folder:
        assert {name for name in files(folder) if name.endswith(".py")} >= CODE
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        assert {name.split(".")[0] + ".py" for name in auto_map.values()} <= files(folder)
        for name in files(folder) - {"model.safetensors"}:
            assert "evil" not in (folder / name).read_text(), name
    assert not folder.exists()


def test_keys_that_name_code_are_dropped_at_any_depth(tmp_path: Path) -> None:
    layers: dict[str, Any] = {"per_layer_config": {"0": {"head_dim": 8} | names_of_code("evil")}}
    folder = tiny_model(tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | layers))
    found = open_source(str(folder)).native_config
    assert found["per_layer_config"] == {"0": {"head_dim": 8}}
    assert "evil" not in json.dumps(found)


def test_a_config_too_deep_to_be_looked_through_is_refused(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    path, depth = folder / "config.json", 600
    deep = f'{{"x": {"[" * depth}{"]" * depth}, '
    path.write_text(path.read_text().replace("{", deep, 1))
    source = open_source(str(folder))
    with pytest.raises(SourceError, match="nested deeper"):
        source.native_config  # noqa: B018


def test_a_checkpoint_runs_as_its_own_config_says_but_for_code(
    checkpoint: Folders, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint("qwen3", "sinks"), tmp_path / "out"))
    path = folder / "config.json"
    before = json.loads(path.read_text())
    changed = before | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "hidden_act": "gelu"}
    path.write_text(json.dumps(changed | names_of_code("evil")))
    with runnable(folder, *open_checkpoint(folder), trust=False) as private:
        assert private != folder
        found = json.loads((private / "config.json").read_text())
    assert found["auto_map"] == before["auto_map"]
    assert {k: v for k, v in found.items() if k != "model_file"} == {
        k: v for k, v in changed.items() if k != "model_file"
    }
    with runnable(folder, *open_checkpoint(folder), trust=True) as own:
        assert own == folder


def test_a_checkpoint_takes_no_code_from_its_source_and_is_proved_against_it(
    copy_of: Folders, tmp_path: Path, capsys: Any
) -> None:
    source, out = copy_of("llama"), tmp_path / "out"
    plant(source, "evil")
    assert run_cli("convert", source, out, "--layers", "1", "--window", 24, "-q") == 0
    found, plan = open_checkpoint(out)
    rendered = render_code(format_of(found, plan.mask))
    assert {name for name in files(out) if name.endswith(".py")} == rendered.keys()
    assert not names_in(out) & names_of_code("").keys() - {"auto_map", "model_file"}
    status, checks = verdict(capsys, out, "--against", source)
    assert status == 0, checks
    tokenizer = out / "tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"eos_token": "!"}))
    _, failed = verdict(capsys, out, "--against", source)
    assert failed["tokenizer and licence are the source's"]["value"] == "tokenizer_config.json"
