"""Sources: found, checked, described and told apart without loading them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from converter.common.errors import FamilyError, SourceError
from converter.model.source import open_source
from tests.tiny import tiny_model


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_source_is_described_and_named_by_its_folder_however_it_is_spelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(tiny_model(tmp_path / "tiny")))
    assert (source.name, source.revision, source.family.title) == ("tiny", None, "Qwen3")
    assert (source.folder, source.shape.layers) == (tmp_path / "tiny", 4)
    assert source.weights.shards == ("model.safetensors",)
    monkeypatch.chdir(tmp_path / "tiny")
    assert open_source(".").name == open_source("../tiny/").name == "tiny"


def test_opening_a_source_loads_neither_torch_nor_transformers(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "tiny")
    program = (
        "import sys\nfrom converter.model.source import open_source\n"
        f"open_source({str(folder)!r}).fingerprint\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.decode().strip() == "[]"


def test_torchs_compiler_is_not_imported_under_a_device(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "tiny")
    # torch 2.7 cannot.
    program = (
        "import sys, torch\nfrom pathlib import Path\n"
        "from converter.model.source import open_source\n"
        "from converter.model.tensors import build_model\n"
        "class Watch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch._dynamo':\n"
        "            print(torch.get_default_device())\n"
        "sys.meta_path.insert(0, Watch())\n"
        f"source = open_source({str(folder)!r})\n"
        "build_model(source, source.folder, torch.float32, trust_remote_code=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.decode().split() == ["cpu"]


def flip_a_weight(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")


def say_it_otherwise(folder: Path) -> None:
    (folder / "README.md").write_text("# tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=4))


CHANGES: dict[str, tuple[Callable[[Path], object], bool]] = {
    "nothing": (lambda _folder: None, False),
    "spelling": (say_it_otherwise, False),
    "config": (lambda folder: edit(folder, rms_norm_eps=1e-5), True),
    "tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{}"), True),
    "chat template": (lambda folder: (folder / "chat_template.jinja").write_text("x"), True),
    "weights": (flip_a_weight, True),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_results_depend_on_changes_the_fingerprint(case: str, tmp_path: Path) -> None:
    change, counts = CHANGES[case]
    folder, copy = tiny_model(tmp_path / "tiny"), tmp_path / "copy"
    shutil.copytree(folder, copy)
    change(copy)
    same = open_source(str(copy)).fingerprint == open_source(str(folder)).fingerprint
    assert same is not counts


def test_quantized_weights_and_a_revision_of_a_folder_are_refused(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "tiny")
    with pytest.raises(SourceError, match="--revision"):
        open_source(str(folder), revision="main")
    edit(folder, quantization_config={"quant_method": "awq"})
    with pytest.raises(FamilyError, match="quantized"):
        open_source(str(folder))


class _Refusing(BaseHTTPRequestHandler):
    """A Hub that has no such repository."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


def test_a_repository_that_the_hub_does_not_have_is_refused(tmp_path: Path) -> None:
    with HTTPServer(("127.0.0.1", 0), _Refusing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        message = _inspect_on_the_hub(server.server_port, tmp_path)
        server.shutdown()
    assert message.startswith("error: the Hub does not give this model\n  where: owner/name")


def test_a_hub_that_cannot_be_reached_is_told_as_such(tmp_path: Path) -> None:
    with HTTPServer(("127.0.0.1", 0), _Refusing) as server:
        port = server.server_port
    message = _inspect_on_the_hub(port, tmp_path)
    assert message.startswith("error: the model is neither a local folder nor in the local Hub")
    assert "the network" in message


def _inspect_on_the_hub(port: int, home: Path) -> str:
    """The message of a command that refuses."""
    done = subprocess.run(
        [sys.executable, "-m", "converter", "inspect", "owner/name"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home), "NO_PROXY": "*"},
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    return done.stderr
