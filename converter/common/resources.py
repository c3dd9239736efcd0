"""Templates and recipes: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.common.errors import UsageError, did_you_mean

_PACKAGE = Path(__file__).parent.parent


def resource_dir(kind: str) -> Path:
    """The folder of `templates` or `recipes`."""
    checkout = _PACKAGE.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / kind).is_dir():
        return checkout / kind
    return _PACKAGE / "_shipped" / kind


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in resource_dir("recipes").glob("*.toml"))


def recipe_path(name: str) -> Path:
    """The file of a shipped recipe, or of the user's own when `name` is a path.

    Raises:
        UsageError: there is neither.
    """
    if name in recipe_names():
        return resource_dir("recipes") / f"{name}.toml"
    path = Path(name)
    if path.is_file():
        return path
    raise UsageError(
        "there is no such recipe",
        where=name,
        expected=f"a file, or one of: {', '.join(recipe_names())}",
        next_step=did_you_mean(name, recipe_names()),
    )


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe file; its values are checked by `converter.settings.build_settings`.

    Raises:
        UsageError: the file is missing or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError("there is no such recipe", where=path, got=error.strerror) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError("the recipe is not valid TOML", where=path, got=error) from error


@dataclass(frozen=True)
class RecipeNotes:
    """What a recipe says about itself in its first comments.

    `measured` is `no`, or where the measurement stands; None when the recipe is for any model.
    """

    summary: str
    expected: tuple[str, ...]
    measured: str | None


def recipe_notes(path: Path) -> RecipeNotes:
    """The first line of a recipe and its `# expected:` and `# measured:` comments."""
    lines = path.read_text(encoding="utf-8").splitlines() or [""]
    said = [line[2:].partition(": ") for line in lines if line.startswith("# ")]
    return RecipeNotes(
        summary=lines[0].lstrip("# ").strip(),
        expected=tuple(text for word, _, text in said if word == "expected"),
        measured=next((text for word, _, text in said if word == "measured"), None),
    )
