"""The wheel works where there is no checkout: templates and recipes are inside it."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

from tests.conftest import DEMO

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's contents, as site-packages would have them."""
    built = tmp_path_factory.mktemp("wheel")
    # The build backend is in the development environment, so that nothing is downloaded.
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--quiet"]
    options = ["--no-build-isolation", "--wheel-dir", str(built)]
    subprocess.run([*command, *options], check=True)
    (wheel,) = built.glob("hybridize-*.whl")
    zipfile.ZipFile(wheel).extractall(built / "site")
    return built / "site"


def run_installed(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the unpacked wheel's command line, away from the checkout."""
    start = (
        f"import sys; sys.path.insert(0, {str(site)!r}); sys.argv[0] = 'hybridize'\n"
        f"import converter; assert converter.__file__.startswith({str(site)!r})\n"
        "from converter.cli import main; main()"
    )
    command = [sys.executable, "-I", "-c", start, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_wheel_holds_the_package_and_what_it_ships_only(unpacked_wheel: Path) -> None:
    top = {path.name for path in unpacked_wheel.iterdir() if not path.name.endswith(".dist-info")}
    assert top == {"converter"}
    resource_dir = unpacked_wheel / "converter" / "_shipped"
    for kind in ("templates", "recipes"):
        names = {path.name for path in (ROOT / kind).iterdir() if path.is_file()}
        assert {path.name for path in (resource_dir / kind).iterdir()} == names


def test_an_installed_wheel_finds_its_recipes(unpacked_wheel: Path, tmp_path: Path) -> None:
    done = run_installed(unpacked_wheel, tmp_path, "recipes", "list")
    assert done.returncode == 0, done.stderr
    assert "plain" in done.stdout


def test_an_installed_wheel_converts(unpacked_wheel: Path, tmp_path: Path) -> None:
    layers = ("--layers", "1", "--window", "16")
    done = run_installed(unpacked_wheel, tmp_path, "convert", str(DEMO), "out", *layers)
    assert done.returncode == 0, done.stderr
    template = (ROOT / "templates" / "modeling_hybrid.py").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "modeling_hybrid.py").read_text(encoding="utf-8") == template


def test_the_wheel_says_what_it_is(unpacked_wheel: Path) -> None:
    (folder,) = unpacked_wheel.glob("*.dist-info")
    told = message_from_string((folder / "METADATA").read_text(encoding="utf-8"))
    assert {"sliding-window", "transformers"} <= set(told["Keywords"].split(","))
    assert "Typing :: Typed" in (told.get_all("Classifier") or [])
    assert (unpacked_wheel / "converter" / "py.typed").exists()
    extras = set(told.get_all("Provides-Extra") or [])
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    texts = [page.read_text(encoding="utf-8") for page in pages]
    code = [path.read_text(encoding="utf-8") for path in (ROOT / "converter").rglob("*.py")]
    named = {name for text in texts + code for name in re.findall(r"hybridize\[([\w-]+)\]", text)}
    assert named and named <= extras
