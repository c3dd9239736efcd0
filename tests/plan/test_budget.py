"""Budgets: counts, fractions, cache memory and losses, and what of them a model can meet."""

from __future__ import annotations

import json
from fractions import Fraction
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.common.errors import PlanError
from converter.model.dimensions import ModelDimensions
from converter.model.mask import FULL, SLIDING, Mask
from converter.plan.budget import Budget, CountBudget, KvBudget, NllBudget, parse_budget
from converter.plan.plan import Plan, kv_bytes
from converter.plan.units import Units
from tests.conftest import CONTEXT, LAYERS, run_cli

MASK = Mask(16)
TOTALS = st.integers(1, 200)
# Qwen3's keys and values in the tiny model: 2 heads of 24 in float32.
TOKEN = 2 * 2 * 24 * 4


def kept_by(budget: Budget, shape: ModelDimensions, mask: Mask) -> int:
    """How many whole layers a budget keeps."""
    return budget.count(Units(len(shape.full_layers)), shape, mask)


def shape_of(total: int, context: int = 131072, kv_heads: int = 2) -> ModelDimensions:
    """A model of so many layers; a token takes 64 bytes for each key/value head in each layer."""
    return ModelDimensions(total, 64, 4, kv_heads, 16, 96, 320, context, 2)


def count_of(text: str, total: int) -> int:
    return kept_by(parse_budget(text), shape_of(total), MASK)


@given(st.integers(1, 500), st.integers(1, 500), TOTALS)
def test_a_fraction_is_rounded_up_to_at_least_one(top: int, bottom: int, total: int) -> None:
    text = f"{top}/{bottom}"
    if top > bottom:
        with pytest.raises(PlanError, match="out of range"):
            parse_budget(text)
        return
    layers = count_of(text, total)
    # The least count of layers that is no smaller a share than asked for, in whole numbers.
    assert (layers - 1) * bottom < top * total <= layers * bottom
    assert 1 <= layers <= total


@given(st.integers(0, 300), TOTALS)
def test_a_count_is_taken_as_it_is(count: int, total: int) -> None:
    if count <= total:
        assert count_of(str(count), total) == count
    else:
        with pytest.raises(PlanError, match="more full-attention layers than the model has"):
            count_of(str(count), total)


@given(st.integers(1, 1000), TOTALS)
def test_a_decimal_is_the_same_as_its_fraction(thousandths: int, total: int) -> None:
    decimal = f"{thousandths // 1000}.{thousandths % 1000:03}"
    assert count_of(decimal, total) == count_of(f"{thousandths}/1000", total)


@given(
    st.text()
    | st.from_regex(r"[0-9/.\-+e ]{1,12}", fullmatch=True)
    | st.from_regex(r"(kv|nll):[0-9.@kMGiBnaf \-]{0,14}", fullmatch=True)
)
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        budget = parse_budget(text)
    except PlanError as error:
        assert error.details["where"] == "--budget"
        return
    assert str(budget) == text.strip()
    try:
        assert 0 <= kept_by(budget, shape_of(8), MASK) <= 8
    except PlanError as error:
        assert error.details["where"] == "--budget"


@pytest.mark.parametrize(
    ("text", "total", "layers"),
    [
        *(("1/4", 28, 7), ("1/4", 30, 8), ("1/4", 2, 1), ("0.25", 28, 7), (".5", 3, 2)),
        *(("1/1", 6, 6), ("1.0", 6, 6), (" 9 ", 36, 9), ("0", 36, 0)),
        *(("25%", 28, 7), ("12.5%", 32, 4), ("100%", 6, 6), ("1%", 6, 1)),
    ],
)
def test_known_budgets(text: str, total: int, layers: int) -> None:
    assert count_of(text, total) == layers


UNREADABLE = [
    *("", "a", "1/0", "-1", "-1/4", "1e2", "1/2/3", "9" * 5000, "nan", "KV:1GB", "kv", "nll", ":"),
    *("kv:", "kv:@4k", "kv:1GB@", "kv:1GB@k", "kv:1GB@4kk", "kv:1GB@-4", "kv:1GB@4k@4k", "kv:1/4"),
    *("%", "25%%", "-5%", "1/4%", "25 %", "kv:25%", "nll:5%"),
    *("kv:-1GB", "kv:nanGB", "kv:infGB", "kv:1gb", "kv:1GB@4.5k", "kv:0GB", "kv:1GB@" + "9" * 99),
    *("nll:", "nll:x", "nll:1/4", "nll:0.05nats", "0.05:nll", "kl:0.05"),
]


@pytest.mark.parametrize("text", UNREADABLE, ids=lambda text: text[:20] or "empty")
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="cannot be read") as caught:
        parse_budget(text)
    for spelling in ("9", "1/4", "0.25", "25%", "kv:2GiB@128k", "nll:0.05"):
        assert spelling in caught.value.details["expected"]


@pytest.mark.parametrize(
    "text",
    [
        *("0/4", "0.0", "5/4", "1.01", "0%", "101%", "kv:1GB@0", "kv:1GB@0k"),
        *("nll:-0.01", "nll:nan", "nll:inf", "nll:-inf", "nll:1e999"),
    ],
)
def test_an_amount_outside_its_range_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="out of range") as caught:
        parse_budget(text)
    assert caught.value.details["got"] == text


def test_a_budget_keeps_its_spelling() -> None:
    assert parse_budget("2/8") == CountBudget("2/8", Fraction(1, 4))
    assert str(parse_budget(" kv:1.5GiB @ 4k ")) == "kv:1.5GiB @ 4k"


@pytest.mark.parametrize(
    ("text", "limit", "tokens"),
    [
        ("kv:2GiB@128k", 2 * 1024**3, 131072),
        ("kv:2GB@128K", 2 * 10**9, 131072),
        ("kv:1.5TiB@1M", 3 * 2**39, 1048576),
        ("kv:2.01GB@1m", 2_010_000_000, 1048576),
        ("kv:640KiB@100000", 655360, 100000),
        ("kv:4MB", 4 * 10**6, None),
        ("kv:700B@1", 700, 1),
        ("kv:0.5MiB@ 32k", 524288, 32768),
    ],
)
def test_a_cache_is_read_with_its_context(text: str, limit: int, tokens: int | None) -> None:
    assert parse_budget(text) == KvBudget(text, limit, tokens)


@pytest.mark.parametrize(("text", "bound"), [("nll:0.05", 0.05), ("nll:0", 0.0), ("nll:2", 2.0)])
def test_a_loss_is_read_and_left_to_measuring(text: str, bound: float) -> None:
    budget = parse_budget(text)
    assert budget == NllBudget(text, bound)
    with pytest.raises(PlanError, match="once plans have been measured") as caught:
        kept_by(budget, shape_of(4), MASK)
    assert caught.value.details["got"] == text


def cached(total: int, full: int, mask: Mask, tokens: int, kv_heads: int) -> int:
    """Bytes by going through every layer and every token that a generated one could look at."""
    return (
        64
        * kv_heads
        * sum(
            layer < full
            or mask.full_attention_decode
            or tokens - 1 - position < mask.window_tokens
            or position < mask.sink_tokens
            for layer, position in product(range(total), range(tokens))
        )
    )


@given(
    total=st.integers(1, 8),
    tokens=st.integers(1, 40),
    window=st.integers(1, 30),
    sinks=st.integers(0, 6),
    decode=st.booleans(),
    kv_heads=st.integers(1, 3),
    share=st.floats(0.01, 1.3),
)
def test_a_cache_holds_the_most_layers_that_fit(
    *, total: int, tokens: int, window: int, sinks: int, decode: bool, kv_heads: int, share: float
) -> None:
    mask, shape = Mask(window, sinks, decode), shape_of(total, 64, kv_heads)
    limit = max(1, int(share * cached(total, total, mask, tokens, kv_heads)))
    budget = parse_budget(f"kv:{limit}@{tokens}")
    sizes = [cached(total, full, mask, tokens, kv_heads) for full in range(total + 1)]
    # What `plan` and `inspect` show is what the budget is held against.
    for full, size in enumerate(sizes):
        kinds = (FULL,) * full + (SLIDING,) * (total - full)
        plan = Plan(kinds, mask, "layers", None, None, "model", None)
        counted = {"full": sizes[-1], "hybrid": size, "context_tokens": tokens}
        assert kv_bytes(plan, shape, tokens) == counted
    if sizes[0] > limit:
        with pytest.raises(PlanError) as caught:
            kept_by(budget, shape, mask)
        assert f"at least kv:{sizes[0]}B" in caught.value.details["expected"]
        assert "--full-decode" in caught.value.details["next step"] or not decode
        # What the message asks for is enough, and no byte less is.
        assert kept_by(parse_budget(f"kv:{sizes[0]}B@{tokens}"), shape, mask) >= 0
        if sizes[0] > 1:
            with pytest.raises(PlanError):
                kept_by(parse_budget(f"kv:{sizes[0] - 1}B@{tokens}"), shape, mask)
        return
    count = kept_by(budget, shape, mask)
    assert sizes[count] <= limit
    assert count == total or sizes[count + 1] > limit


def test_a_published_model_within_two_gibibytes() -> None:
    """Qwen3-4B at 128k, by hand: 4 KiB a token in a layer, so 512 MiB full and 8 MiB sliding."""
    qwen = ModelDimensions(36, 2560, 32, 8, 128, 9728, 151936, 262144, 2)
    assert 3 * 512 + 33 * 8 <= 2048 < 4 * 512 + 32 * 8
    assert kept_by(parse_budget("kv:2GiB@128k"), qwen, Mask(2048)) == 3
    assert kept_by(parse_budget("kv:4GiB"), qwen, Mask(2048)) == 3
    assert kept_by(parse_budget("kv:18GiB@128k"), qwen, Mask(2048)) == 36
    assert kept_by(parse_budget("kv:18GiB@128k"), qwen, Mask(2048, 0, True)) == 36


def test_full_attention_in_decode_frees_nothing_and_the_refusal_says_so() -> None:
    shape, mask, whole = shape_of(4, 512), Mask(16, 0, True), 4 * 512 * 128
    assert kept_by(parse_budget(f"kv:{whole}B"), shape, mask) == 4
    with pytest.raises(PlanError, match="every layer keeps its whole KV cache") as caught:
        kept_by(parse_budget(f"kv:{whole - 1}B"), shape, mask)
    assert f"kv:{whole}B" in caught.value.details["expected"]


def test_only_a_cache_names_a_context_and_none_beyond_the_model() -> None:
    budget = parse_budget("kv:1TiB@1k")
    assert kept_by(budget, shape_of(4, 1024), MASK) == 4
    with pytest.raises(PlanError, match="longer than the model's") as caught:
        kept_by(budget, shape_of(4, 1023), MASK)
    assert caught.value.details["expected"] == "at most 1023 tokens"
    tokens = [
        parse_budget(text).tokens(shape_of(4, 2048)) for text in ("2", "1/4", "nll:1", "kv:9GB")
    ]
    assert (set(tokens), budget.tokens(shape_of(4, 2048))) == ({2048}, 1024)


def test_plan_chooses_by_memory_and_shows_the_same_bytes(
    sources: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = CONTEXT // 2
    size = (2 * tokens + (LAYERS - 2) * 16) * TOKEN
    options = ("--method", "periodic", "--window", "16", "--json")
    for limit, count in ((size, 2), (size - 1, 1)):
        budget = f"kv:{limit}B@{tokens}"
        assert run_cli("plan", sources["qwen3"], "--budget", budget, *options) == 0
        value = json.loads(capsys.readouterr().out)
        assert (len(value["full_attention_layers"]), value["budget"]) == (count, budget)
        assert value["kv_bytes"]["context_tokens"] == tokens
        assert value["kv_bytes"]["hybrid"] <= limit
    context = ("--context", CONTEXT)
    assert run_cli("plan", sources["qwen3"], "--budget", budget, *context, *options) == 0
    assert json.loads(capsys.readouterr().out)["kv_bytes"]["context_tokens"] == CONTEXT
    budget = f"kv:{(2 * CONTEXT + (LAYERS - 2) * 16) * TOKEN}B"
    options = ("--method", "periodic", "--offset", "1", "--window", "16", "--json")
    assert run_cli("plan", sources["qwen3"], "--budget", budget, *options) == 0
    assert json.loads(capsys.readouterr().out)["full_attention_layers"] == [1, 3]


@pytest.mark.parametrize(
    ("budget", "status"), [("kv:2GiB@128k", 0), ("nll:0.05", 0), ("kv:2", 0), ("kv:x", 2)]
)
def test_a_recipes_budget_is_checked(budget: str, status: int, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'# mine\nbudget = "{budget}"\n')
    assert run_cli("recipes", "check", path) == status
