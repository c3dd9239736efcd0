"""Write what the recipes for real models are expected to cost, from their published configurations.

    python benchmarks/recipe_costs.py

A test computes the same lines again and fails when a recipe states others.
"""

from __future__ import annotations

import json
from pathlib import Path

from converter.calibration.cost import expected_cost
from converter.model.dimensions import read_shape
from converter.model.families import family_of
from converter.settings import build_settings, read_recipe

ROOT = Path(__file__).parent.parent
RECIPES, CONFIGS = ROOT / "recipes", ROOT / "tests" / "published_configs"


def expected_lines(name: str) -> list[str]:
    """The `# expected:` comments of the recipe for a published model."""
    path = CONFIGS / f"{name}.json"
    config = json.loads(path.read_text(encoding="utf-8"))["config"]
    settings = build_settings(read_recipe(RECIPES / f"{name}.toml"), (), {}, name)
    cost = expected_cost(
        config, family_of(config["model_type"], path), read_shape(config, path), settings
    )
    return [f"# expected: {sentence}" for sentence in cost.sentences()]


def main() -> None:
    """Rewrite the comments of every recipe that has a published configuration."""
    for path in sorted(CONFIGS.glob("*.json")):
        recipe = RECIPES / f"{path.stem}.toml"
        first, *rest = recipe.read_text(encoding="utf-8").splitlines()
        kept = [line for line in rest if not line.startswith("# expected:")]
        lines = [first, *expected_lines(path.stem), *kept]
        recipe.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(recipe.name, *lines[1:4], sep="\n  ")


if __name__ == "__main__":
    main()
