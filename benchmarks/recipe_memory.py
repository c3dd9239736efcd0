"""Write the memory that recipes for real models take, from their published configurations.

    python benchmarks/recipe_memory.py

A test computes the same lines again and fails when a recipe states others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converter.model.families import family_of
from converter.plan.memory import ExpectedMemory, expected_memory
from converter.settings import Settings, build_settings, read_recipe

ROOT = Path(__file__).parent.parent
RECIPES, CONFIGS = ROOT / "recipes", ROOT / "tests" / "published_configs"


def memory_of(config: Mapping[str, Any], settings: Settings) -> ExpectedMemory:
    """What converting a model of this configuration is expected to take."""
    family = family_of(config["model_type"], "config")
    dimensions = family.dimensions(config, "config")
    mask, kept = settings.mask(dimensions), settings.full_layers(dimensions)
    prompt_tokens = settings.prompt_tokens(dimensions)
    return expected_memory(config, family, dimensions, mask, kept, prompt_tokens)


def expected_lines(name: str) -> list[str]:
    """The `# expected:` comments of the recipe for a published model."""
    config = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))["config"]
    settings = build_settings(read_recipe(RECIPES / f"{name}.toml"), (), {}, name)
    return [f"# expected: {sentence}" for sentence in memory_of(config, settings).sentences()]


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
