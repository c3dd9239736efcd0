"""What full layers cost in vLLM, against figures that vLLM told; its own code in test_vllm.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from converter.engines.vllm import held_layers, vllm_cache
from converter.model.dimensions import read_shape
from converter.model.mask import Mask
from tests.cli.test_convert import run_json
from tests.conftest import run_cli
from tests.tiny import config_of, tiny_model

LAYERS, WINDOW, CONTEXT = 28, 2048, 131072
# How many times the tokens of full attention vLLM 0.32.0 had room for, by count of full layers.
FIGURES = {
    28: 1.0, 24: 1.16, 20: 1.15, 16: 1.67, 14: 1.91, 13: 1.78, 9: 2.72, 8: 3.06, 7: 3.50, 5: 4.5,
    2: 8.6, 1: 12.2,
}  # fmt: skip
# What its sliding layers held besides the window: a batch of the LLM class, and a block.
BATCH, BLOCK = 4096, 128
SHAPE = read_shape(
    config_of(num_hidden_layers=LAYERS, max_position_embeddings=CONTEXT), "config.json"
)


@pytest.mark.parametrize(("full", "ratio"), FIGURES.items(), ids=str)
def test_the_figures_are_vllms(full: int, ratio: float) -> None:
    held_full, held_sliding = held_layers(full, LAYERS)
    tokens = held_full * CONTEXT + held_sliding * (WINDOW - 1 + BATCH + BLOCK)
    assert LAYERS * CONTEXT / tokens == pytest.approx(ratio, rel=0.005)


@pytest.mark.parametrize(
    ("full", "held", "better"),
    [
        (0, (0, 28), ()),
        (7, (7, 21), ()),
        (9, (9, 27), ()),
        # Both kinds are filled to 15: 14 of each take less.
        (13, (15, 15), (11, 14)),
        (20, (24, 8), (16, 21)),
        (18, (20, 10), (16,)),
        (24, (24, 4), ()),
        (28, (28, 0), ()),
    ],
)
def test_filled_groups_have_better_neighbours(
    full: int, held: tuple[int, int], better: tuple[int, ...]
) -> None:
    found = vllm_cache(full, Mask(WINDOW), SHAPE, CONTEXT)
    assert (found.full_layers, found.sliding_layers) == held
    assert found.better == better
    token = SHAPE.kv_bytes_per_token
    assert found.bytes == (held[0] * CONTEXT + held[1] * WINDOW) * token
    costs = [vllm_cache(n, Mask(WINDOW), SHAPE, CONTEXT).bytes for n in range(LAYERS + 1)]
    ideal = (full * CONTEXT + (LAYERS - full) * WINDOW) * token
    assert all(costs[n] <= (ideal if n < full else found.bytes) for n in better)


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "deep", num_hidden_layers=LAYERS, num_attention_heads=2)


def test_a_plan_for_vllm_says_what_it_takes_there(
    deep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--budget", 20, "--method", "periodic", "--window", 16)
    assert "vllm" not in run_json("plan", deep, *options)
    value = run_json("plan", deep, *options, "--target", "vllm")["vllm"]
    assert (value["full_layers"], value["sliding_layers"]) == (24, 8)
    assert value["better"] == [16, 21]
    assert run_cli("plan", deep, *options, "--target", "vllm") == 0
    printed = capsys.readouterr().out
    assert "as much as 24 full and 8 sliding layers" in printed
    assert "16 or 21 full layers" in printed


def test_inspect_says_what_each_budget_takes_in_vllm(
    deep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    costs = run_json("inspect", deep, "--window", "16")["kv_bytes"]
    assert [cost["vllm"]["full_layers"] for cost in costs] == [4, 7, 14, 28]
    assert all(cost["vllm"]["bytes"] >= cost["hybrid"] for cost in costs)
    assert run_cli("inspect", deep, "--window", 16) == 0
    assert "in vLLM" in capsys.readouterr().out
    # vLLM runs windows only.
    costs = run_json("inspect", deep, "--window", "16", "--sinks", "2")["kv_bytes"]
    assert all(cost["vllm"] is None for cost in costs)
