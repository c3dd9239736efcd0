"""Configurations with one value that makes no sense: a refusal, never an error of Python's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from converter.common.errors import HybridizeError
from converter.model.source import open_source
from tests.tiny import tiny_model

LEFT_OUT = object()
WRONG: list[Any] = [None, "x", -1, 0, 1.5, True, [], {}, [1], {"a": 1}, [None], 10**12, LEFT_OUT]
OWN_WINDOW = {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"] * 2}
EXPERTS = {"num_experts": 2, "moe_intermediate_size": 8, "num_experts_per_tok": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma4_text": {
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "attention_k_eq_v": True,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "enable_moe_block": True,
        "num_experts": 2,
        "top_k_experts": 1,
        "moe_intermediate_size": 8,
        **OWN_WINDOW,
    },
    "gemma3_text": OWN_WINDOW,
    "glm4_moe": {"n_routed_experts": 2, "moe_intermediate_size": 8, "num_experts_per_tok": 1},
    "qwen3_moe": EXPERTS,
    "qwen3_5": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "qwen3_5_moe": {"shared_expert_intermediate_size": 8, **EXPERTS},
}


def damaged(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The configuration with each value wrong in each way, the nested ones, too."""
    inside = [("text_config", key) for key in config.get("text_config", {})]
    for path in [*((key,) for key in config), *inside]:
        for value in WRONG:
            changed = deepcopy(config)
            place = changed
            for key in path[:-1]:
                place = place[key]
            if value is LEFT_OUT:
                del place[path[-1]]
            else:
                place[path[-1]] = value
            yield changed


@pytest.mark.parametrize("family", CONFIGS)
def test_a_value_that_makes_no_sense_is_refused(family: str, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", model_type=family, **CONFIGS[family])
    path = folder / "config.json"
    good = json.loads(path.read_text())
    refused = 0
    for config in damaged(good):
        path.write_text(json.dumps(config))
        with suppress(HybridizeError):
            source = open_source(str(folder))
            source.family.weights_per_token(source.config, source.shape)
            source.shape.other_cache_bytes(1000)
            refused -= 1
        refused += 1
    assert refused > len(good)
