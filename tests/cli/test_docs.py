"""Every command in the documentation runs, in order, as a reader would type it."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.conftest import DEMO, run_cli

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
# A Hub id in the documentation is found in a local cache that holds the demonstration model.
HUB_ID = "Qwen/Qwen3-0.6B"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def commands(page: Path) -> list[str]:
    """The `hybridize` lines of a page's `sh` blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("hybridize ")]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks to the documentation like a checkout, with the Hub in its cache."""
    (tmp_path / "benchmarks").mkdir()
    shutil.copytree(DEMO, tmp_path / "benchmarks" / "demo-model")
    cache = tmp_path / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    shutil.copytree(DEMO, cache / "snapshots" / COMMIT)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda page: page.name)
def test_every_documented_command_runs(page: Path) -> None:
    for command in commands(page):
        arguments = shlex.split(command, comments=True)[1:]
        assert run_cli(*arguments) == 0, command


def test_every_command_is_in_the_readme() -> None:
    """Every option is in its help: tests/cli/test_usage.py."""
    from converter.cli import COMMANDS

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in COMMANDS:
        assert f"hybridize {command.name}" in readme, f"{command.name} is not in the README"


def test_every_engine_and_family_is_in_the_documentation() -> None:
    from converter.engines.support import ENGINES
    from converter.model.families import FAMILIES

    engines_page = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    for engine in ENGINES:
        assert f"| {engine} |" in engines_page
    checkpoint_page = (ROOT / "docs" / "checkpoint.md").read_text(encoding="utf-8")
    for family in FAMILIES.values():
        assert family.title.split(",")[0] in checkpoint_page


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.usefixtures("reader")
def test_the_documented_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(code, {})  # noqa: S102 - our own page
    assert capsys.readouterr().out.splitlines()[-1] == "demo-hybrid True"


def test_every_name_to_import_is_on_the_page() -> None:
    from converter import pipeline

    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    for name in pipeline.__all__:
        assert hasattr(pipeline, name)
        assert f"`{name}" in page, name
