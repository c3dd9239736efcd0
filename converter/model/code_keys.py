"""Keys by which a model's JSON files name code, or files and repositories beside the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converter.common.errors import SourceError

_CODE_KEYS = frozenset(
    {
        # Python files of the folder or of another repository: transformers, its pipelines, mlx-lm.
        *("auto_map", "custom_generate", "custom_pipelines", "model_file"),
        # Kernels, which transformers fetches from the Hub when the name has a slash.
        *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
        *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
        *("kernel_config", "use_kernels", "fusion_config", "quantization_config"),
        # Another config.json for some releases of transformers.
        "configuration_files",
        # Other weights than the model's own.
        *("_name_or_path", "name_or_path", "transformers_weights", "speculators_config"),
    }
)


def data_only(value: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """What a JSON file holds, without the keys that name code, at any depth.

    Raises:
        SourceError: it is nested too deep to be looked through.
    """
    try:
        return dict(_kept(value))
    except RecursionError as error:
        problem = "a file of the model is nested deeper than any of its kind"
        raise SourceError(problem, where=where) from error


def _kept(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _kept(held) for key, held in value.items() if key not in _CODE_KEYS}
    return [_kept(held) for held in value] if isinstance(value, list) else value
