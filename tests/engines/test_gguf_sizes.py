"""Metadata that no model has: refused by us, or by llama.cpp where it can do no harm."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from converter.model.families.stock_gguf import Value, array, integer, real
from tests.ggufs import Files, Refused, exported, rewritten

NAN, HUGE = float("nan"), (1 << 31) - 1
ATTENTION, ROPE = "step35.attention", "step35.rope"
EPSILON = f"{ATTENTION}.layer_norm_rms_epsilon"
# A key, what stands there, and what is said. llama.cpp would abort on some of these, allocate by
# others, and never end on a third kind.
DAMAGE: dict[str, tuple[str, Value | None, str]] = {
    "no layers": ("step35.block_count", integer(0), "lacks a size"),
    "2^31 layers": ("step35.block_count", integer(HUGE), "with tensors of 4 layers"),
    "2^32 layers": ("step35.block_count", integer(2 * HUGE), "lacks a size"),
    "no context": ("step35.context_length", integer(0), "lacks a size"),
    "a wider model": ("step35.embedding_length", integer(HUGE), "cannot be true"),
    "a context of -1": ("step35.context_length", Value("int32", -1), "lacks a size"),
    "2^31 heads": (f"{ATTENTION}.head_count", integer(HUGE), "cannot be true"),
    "three heads": (f"{ATTENTION}.head_count", integer(3), "cannot be true"),
    "heads that are text": (f"{ATTENTION}.head_count", Value("string", "x"), "lacks a size"),
    "no heads of keys": (f"{ATTENTION}.head_count_kv", integer(0), "cannot be true"),
    "heads of 2^31": (f"{ATTENTION}.key_length", integer(HUGE), "cannot be true"),
    "values of none": (f"{ATTENTION}.value_length", integer(0), "cannot be true"),
    "epsilon not a number": (EPSILON, real(NAN), "a finite number"),
    "epsilon of -1": (EPSILON, real(-1.0), "from 0 to 1"),
    "no epsilon": (EPSILON, None, "does not load this file"),
    "a rotary dimension of 3": (f"{ROPE}.dimension_count", integer(3), "an even number"),
    "a rotary dimension of 0": (f"{ROPE}.dimension_count", integer(0), "an even number"),
    "no rotary dimension": (f"{ROPE}.dimension_count_swa", None, "SIGABRT"),
    "a rotary base of 0": (f"{ROPE}.freq_base", real(0.0), "above 0"),
    "a rotary base of infinity": (f"{ROPE}.freq_base", real(float("inf")), "a finite number"),
    "a vocabulary of 2^31": ("step35.vocab_size", integer(HUGE), "320 words"),
    "no feed-forward": ("step35.feed_forward_length", integer(0), "does not load this file"),
    "a list of sizes": ("step35.feed_forward_length", array("uint32", [9]), "does not load"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_metadata_that_no_model_has_is_refused_at_once(
    case: str, gguf: Files, tmp_path: Path, refused: Refused
) -> None:
    key, value, words = DAMAGE[case]
    file = rewritten(gguf("qwen3"), tmp_path / "out.gguf", {key: value})
    started, before = time.monotonic(), psutil.Process().memory_info().rss
    message = refused("run", file, "--prompt", "the thing", "-q")
    assert words in message and "Traceback" not in message
    assert psutil.Process().memory_info().rss - before < 64 << 20
    assert time.monotonic() - started < 30


def test_a_context_beyond_memory_is_refused_at_once(
    gguf: Files, tmp_path: Path, refused: Refused
) -> None:
    changes = {"step35.context_length": integer(HUGE)}
    file = rewritten(gguf("qwen3"), tmp_path / "out.gguf", changes)
    message = refused("run", file, "--prompt", "a", "--context", HUGE, "-q")
    assert "too little memory for so long a context" in message and "at most" in message


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("attention.head_count", integer(HUGE), "attn_q.weight"),
        ("attention.key_length", integer(HUGE), "attn_q.weight"),
        ("block_count", integer(2), "with tensors of 4 layers"),
        ("rope.freq_base", real(NAN), "a finite number"),
    ],
)
def test_a_stock_file_is_not_believed_either(
    key: str, value: Value, words: str, hybrid: Files, tmp_path: Path, refused: Refused
) -> None:
    stock = exported(hybrid("llama"), tmp_path / "stock.gguf", "--stock-arch")
    file = rewritten(stock, tmp_path / "damaged.gguf", {f"llama.{key}": value})
    plan, out = hybrid("llama") / "hybrid" / "plan.json", tmp_path / "out.gguf"
    assert words in refused("export", "--from-gguf", file, "--plan", plan, out, "-q")
    assert not out.exists()
