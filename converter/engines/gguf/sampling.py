"""How tokens are drawn: what a checkpoint says of it, and a GGUF (keys `general.sampling.*`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converter.common.errors import CheckpointError
from converter.common.files import read_json_object
from converter.inference.completion import GenerationSettings
from converter.model.families.stock_gguf import Keys, Value

# llama.cpp's names of what transformers calls otherwise, and what transformers draws by where
# nothing is said.
_NAMES = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
_DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
_PREFIX = "general.sampling."


def sampling_keys(folder: Path) -> dict[str, Value]:
    """Keys for what generation_config.json says; none where it takes the most likely token.

    llama.cpp's own programs take them as their defaults, too.

    Raises:
        CheckpointError: the file is no JSON object.
    """
    path = folder / "generation_config.json"
    told = read_json_object(path, CheckpointError) if path.is_file() else {}
    if told.get("do_sample") is not True:
        return {}
    values = {**_DEFAULTS, **told}
    return {
        _PREFIX + theirs: Value("int32" if ours == "top_k" else "float32", values[ours])
        for ours, theirs in _NAMES.items()
        if _is_usable(ours, values[ours])
    }


def sampling_of(keys: Keys, settings: GenerationSettings) -> Mapping[str, float]:
    """How to draw: as the user says, else as the file does, else the most likely token."""
    found = {ours: keys.get(_PREFIX + theirs) for ours, theirs in _NAMES.items()}
    said = {name: v.value for name, v in found.items() if v and _is_usable(name, v.value)}
    said |= {name: value for name in _NAMES if (value := getattr(settings, name)) is not None}
    return {**_DEFAULTS, **(said or {"temperature": 0.0}), "seed": settings.seed}


def _is_usable(name: str, value: Any) -> bool:
    """Whether a foreign value is a number that may stand there."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    if name == "top_k":
        return isinstance(value, int) and 0 <= value < 1 << 31
    return math.isfinite(value) and 0 <= value <= (math.inf if name == "temperature" else 1)
