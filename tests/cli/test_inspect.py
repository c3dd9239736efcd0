"""`inspect` and `plan` as a user reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from converter.engines.support import ENGINES
from converter.model.families import FAMILIES as TABLE
from tests.cli.test_convert import run_json
from tests.conftest import CONTEXT, FAMILIES, LAYERS, run_cli

TOKEN = 2 * 2 * 24 * 4  # Qwen3's keys and values: 2 heads of 24 in float32


@pytest.mark.parametrize("family", FAMILIES)
def test_inspect_names_the_family_and_every_engine(family: str, sources: dict[str, Path]) -> None:
    value = run_json("inspect", sources[family], "--window", "16")
    assert value["family"] == TABLE[family].title
    assert value["form"]["native"] is True
    assert [engine["engine"] for engine in value["engines"]] == list(ENGINES)
    by_heads = {engine["engine"]: engine["word"] for engine in value["engines_by_kv_head"]}
    assert by_heads.pop("transformers") == "needs a flag"
    assert set(by_heads.values()) == {"refused"}


def test_inspect_counts_kv_bytes_by_budget(sources: dict[str, Path]) -> None:
    value = run_json("inspect", sources["qwen3"], "--window", "16", "--sinks", "2")
    assert value["form"]["native"] is False
    costs = {cost["budget"]: cost for cost in value["kv_bytes"]}
    assert set(costs) == {"1 (1/8)", "1 (1/4)", "2 (1/2)", "all"}
    assert costs["all"]["hybrid"] == costs["all"]["full"] == LAYERS * CONTEXT * TOKEN
    assert costs["2 (1/2)"]["hybrid"] == (2 * CONTEXT + 2 * 18) * TOKEN


def test_inspect_prints_tables(
    sources: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("inspect", sources["mistral"], "--window", "16") == 0
    printed = capsys.readouterr()
    for words in ("Mistral, 4 layers", "SGLang", "silent full", "KV cache", "1 (1/4)"):
        assert words in printed.out
    assert "engines that run a hybrid by KV heads: transformers\n" in printed.out
    assert printed.err == ""


def test_plan_shows_the_strip(sources: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--budget", "1/2", "--window", "16", "--method", "periodic", "--offset", "1")
    assert run_cli("plan", sources["qwen3"], *options) == 0
    printed = capsys.readouterr().out
    assert "·█·█" in printed
    value = run_json("plan", sources["qwen3"], *options)
    assert value["full_attention_layers"] == [1, 3]
    assert value["kv_bytes"]["context_tokens"] == CONTEXT


def test_plan_costs_another_context_when_asked(sources: dict[str, Path]) -> None:
    options = ("--layers", "1", "--window", "16", "--context", "100000")
    cost = run_json("plan", sources["qwen3"], *options)["kv_bytes"]
    assert cost["full"] == LAYERS * 100000 * TOKEN
    assert cost["hybrid"] == (100000 + 3 * 16) * TOKEN
