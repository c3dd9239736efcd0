"""The packages of `converter`: what may import what, and how large files and functions may grow."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "converter"
# An import goes down, never up or across; CONTRIBUTING.md draws this.
FLOORS = (
    {"common"},
    {"model"},
    {"plan"},
    {"checkpoint"},
    {"inference"},
    {"calibration", "engines"},
    {"evaluation", "publish", "settings"},
    {"pipeline"},
    {"cli"},
    {"__main__"},
)
FLOOR = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
FILES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imports(name: str) -> set[str]:
    """The modules of ours that a module names, also inside functions and for types alone."""
    found: set[str] = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in FILES}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "converter":
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {one if one in FILES else str(node.module) for one in full}
    return found - {name}


def part_of(name: str) -> str:
    """The package or flat module of a module; nothing for `converter` itself."""
    return [*name.split("."), ""][1]


def test_every_package_has_its_floor() -> None:
    assert {part_of(name) for name in FILES} - {""} == set(FLOOR)
    assert sum((ROOT / part / "__init__.py").exists() for part in FLOOR) == 10


@pytest.mark.parametrize("name", FILES)
def test_imports_go_down(name: str) -> None:
    mine = part_of(name)
    for imported in imports(name):
        other = part_of(imported)
        if mine and other and other != mine:
            assert FLOOR[other] < FLOOR[mine], f"{name} imports {imported}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    below = {name: imports(name) for name in FILES}
    while leaves := {name for name, others in below.items() if not others & below.keys()}:
        below = {name: others for name, others in below.items() if name not in leaves}
    assert not below, f"circles among {sorted(below)}"


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_fit_their_screens(name: str) -> None:
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= 400
    for node in ast.walk(TREES[name]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{name}.{node.name}"
