"""Hostile GGUF files, as `tests/hostile_cases.py` has other inputs."""

from __future__ import annotations

from pathlib import Path

from converter.model.families.stock_gguf import Value, integer, real, text
from tests.conftest import run_cli
from tests.ggufs import exported, make_bpe_tokenizer, rewritten
from tests.hostile_cases import Command, Place, case

HUGE = (1 << 31) - 1


def _file(place: Place, *options: str) -> tuple[Path, Path]:
    """A good file, and the plan of the checkpoint that it was made from."""
    make_bpe_tokenizer(place.model)
    hybrid = place.beside / "hybrid"
    assert run_cli("convert", place.model, hybrid, "--layers", "1", "--window", "16", "-q") == 0
    return exported(hybrid, place.beside / "good.gguf", *options), hybrid / "hybrid" / "plan.json"


def _run(place: Place, key: str, value: Value | None, *options: object) -> Command:
    file, _ = _file(place)
    damaged = rewritten(file, place.beside / "damaged.gguf", {key: value})
    return ("run", damaged, "--prompt", "the thing", "-q", *options)


def _cut(place: Place) -> Command:
    file, _ = _file(place)
    file.write_bytes(file.read_bytes()[:-1000])
    return ("run", file, "--prompt", "the thing", "-q")


def _retrofit(place: Place, key: str, value: Value) -> Command:
    file, plan = _file(place, "--stock-arch")
    damaged = rewritten(file, place.beside / "damaged.gguf", {key: value})
    return ("export", "--from-gguf", damaged, "--plan", plan, place.beside / "out", "-q")


_HEADS, _EPSILON = "step35.attention.head_count", "step35.attention.layer_norm_rms_epsilon"
_ROTARY, _TEMPLATE = "step35.rope.dimension_count", "tokenizer.chat_template"
CASES = (
    case("GGUF: cut short", _cut),
    case("GGUF: 2^31 layers", _run, "step35.block_count", integer(HUGE)),
    case("GGUF: 2^31 heads", _run, _HEADS, integer(HUGE)),
    case("GGUF: heads that are text", _run, _HEADS, text("x")),
    case("GGUF: an epsilon that is no number", _run, _EPSILON, real(float("nan"))),
    case("GGUF: a rotary dimension of 3", _run, _ROTARY, integer(3)),
    case("GGUF: a rotary dimension of 0", _run, _ROTARY, integer(0)),
    case("GGUF: a key that llama.cpp aborts without", _run, f"{_ROTARY}_swa", None),
    case(
        "GGUF: a context of 2^31, asked for",
        *(_run, "step35.context_length", integer(HUGE), "--context", HUGE),
    ),
    case("GGUF: a chat template of 10^9", _run, _TEMPLATE, text("{{ 'x' * 10**9 }}"), "--chat"),
    case("GGUF without a plan: 2^31 heads", _retrofit, "qwen2.attention.head_count", integer(HUGE)),
)
