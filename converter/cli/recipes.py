"""`hybridize recipes`: list, show and check recipes."""

from __future__ import annotations

from dataclasses import asdict

import click

from converter.cli.grouping import OrderedGroup
from converter.cli.options import Common, common_options
from converter.common.resources import read_recipe, recipe_names, recipe_notes, recipe_path
from converter.settings import build_settings


@click.group(cls=OrderedGroup)
def recipes() -> None:
    """List, show and check recipes: conversions as files."""


@recipes.command("list")
@common_options(recipe=False)
def list_recipes(common: Common) -> None:
    """List the recipes that ship.

    Told is also whether anybody measured what they are expected to cost.
    """
    notes = {name: recipe_notes(recipe_path(name)) for name in recipe_names()}
    rows = [(name, note.summary, note.measured or "") for name, note in notes.items()]
    common.console.result(
        {"recipes": [{"name": name, **asdict(note)} for name, note in notes.items()]},
        lambda: common.console.table(("recipe", "for", "measured"), rows),
    )


@recipes.command("show")
@click.argument("name")
@common_options(recipe=False)
def show_recipe(common: Common, name: str) -> None:
    """Print a recipe."""
    text = recipe_path(name).read_text(encoding="utf-8")
    common.console.result({"name": name, "text": text}, lambda: common.console.stream(text))


@recipes.command("check")
@click.argument("name")
@common_options(recipe=False)
def check_recipe(common: Common, name: str) -> None:
    """Check a recipe's keys and values, all at once."""
    path = recipe_path(name)
    settings = build_settings(read_recipe(path), (), {}, path.name)
    settings.parsed_budget()
    common.console.result(
        {"name": name, "ok": True, "settings": asdict(settings)},
        lambda: common.console.print(f"{path.name}: every key and value is good"),
    )
