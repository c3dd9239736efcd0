"""The recipes that ship: every one is good, found by name, and says what it is for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from converter.common.errors import UsageError
from converter.common.resources import recipe_names, recipe_notes, recipe_path, resource_dir
from converter.plan.budget import parse_budget
from converter.settings import build_settings, read_recipe
from tests.conftest import run_cli


def test_some_recipes_ship() -> None:
    assert recipe_names()
    assert sorted(path.name for path in resource_dir("recipes").iterdir()) == [
        f"{name}.toml" for name in recipe_names()
    ]


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_is_good(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = build_settings(read_recipe(recipe_path(name)), (), {}, name)
    assert settings.layers is not None or str(parse_budget(str(settings.budget))) == settings.budget
    assert run_cli("recipes", "check", name, "--json") == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_says_what_it_is_for(name: str) -> None:
    text = recipe_path(name).read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert len(recipe_notes(recipe_path(name)).summary) > 20


def test_recipes_are_listed_with_their_summaries(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("recipes", "list", "--json") == 0
    listed = json.loads(capsys.readouterr().out)["recipes"]
    assert [entry["name"] for entry in listed] == recipe_names()
    assert all(
        entry["summary"] == recipe_notes(recipe_path(entry["name"])).summary for entry in listed
    )


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_shown_whole(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("recipes", "show", name) == 0
    assert capsys.readouterr().out == recipe_path(name).read_text(encoding="utf-8").rstrip() + "\n"


def test_a_recipe_of_ones_own_is_found_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("# mine\n")
    assert recipe_path(str(path)) == path
    assert recipe_notes(path).summary == "mine"


def test_an_unknown_recipe_is_refused_with_the_nearest_name() -> None:
    name = recipe_names()[0]
    with pytest.raises(UsageError, match="no such recipe") as caught:
        recipe_path(f"{name}s")
    assert caught.value.details["next step"] == f"did you mean {name}?"
    assert name in caught.value.details["expected"]


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such recipe"):
        recipe_path(str(tmp_path))


def test_a_recipe_reaches_the_plan(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('method = "periodic"\nbudget = "1/2"\nwindow = 16\noffset = 1\n')
    plan = ("plan", sources["qwen3"], "--recipe", path, "--json")
    assert run_cli(*plan) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["full_attention_layers"] == [1, 3]
    assert (first["mask"]["window_tokens"], first["budget"]) == (16, "1/2")
    assert run_cli(*plan, "--set", "window=32", "--offset", "0") == 0
    second = json.loads(capsys.readouterr().out)
    assert second["full_attention_layers"] == [0, 2]
    assert second["mask"]["window_tokens"] == 32
