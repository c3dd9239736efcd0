"""Write the sizes that recipes for real models state, from their published configurations.

    python benchmarks/recipe_memory.py

A test computes the same lines again and fails when a recipe states others. What measuring and
proving take is not foretold here: a run asks its device first, and says.
"""

from __future__ import annotations

import json
from pathlib import Path

from converter.common.resources import read_recipe
from converter.common.units import human_bytes
from converter.model.families import family_of
from converter.plan.plan import cache_bytes
from converter.settings import build_settings

ROOT = Path(__file__).parent.parent
RECIPES, CONFIGS = ROOT / "recipes", ROOT / "tests" / "published_configs"


def expected_line(name: str) -> str:
    """The `# expected:` comment of the recipe for a published model."""
    found = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    config = found["config"]
    settings = build_settings(read_recipe(RECIPES / f"{name}.toml"), (), {}, name)
    family = family_of(config["model_type"], "config")
    shape = family.dimensions(config, "config")
    mask, tokens = settings.mask(shape), shape.context_tokens
    full = cache_bytes(len(shape.full_layers), mask, shape, tokens)
    hybrid = cache_bytes(settings.kept(shape), mask, shape, tokens)
    weights = found["parameters"] * shape.kv_bytes_per_value
    return (
        f"# expected: weights {human_bytes(weights)}; KV cache of "
        f"{tokens:,} tokens {human_bytes(hybrid)} instead of {human_bytes(full)}"
    )


def main() -> None:
    """Rewrite the comment of every recipe that has a published configuration."""
    for path in sorted(CONFIGS.glob("*.json")):
        recipe = RECIPES / f"{path.stem}.toml"
        first, *rest = recipe.read_text(encoding="utf-8").splitlines()
        kept = [line for line in rest if not line.startswith("# expected:")]
        lines = [first, expected_line(path.stem), *kept]
        recipe.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(recipe.name, lines[1], sep="\n  ")


if __name__ == "__main__":
    main()
