"""The attention that ships, against a mask decided pair by pair and a softmax in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from tests.templates.cases import BLOCK, HYBRID, KERNELS, PLAIN, Case, cases, compare, packed_cases


@settings(max_examples=800, deadline=None, derandomize=True)
@given(case=cases())
def test_float64_is_the_brute_force(case: Case) -> None:
    compare(case, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@settings(max_examples=80, deadline=None, derandomize=True)
@given(case=cases())
def test_other_types_stay_within_their_rounding(dtype: torch.dtype, case: Case) -> None:
    compare(case, dtype)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(case=cases(), block_rows=st.integers(1, 300))
def test_the_block_size_does_not_change_the_result(case: Case, block_rows: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for code in (KERNELS, HYBRID):
            patch.setattr(code, "BLOCK_ROWS", block_rows)
        compare(case, torch.float64)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(case=cases().map(lambda case: replace(case, left=(), right=())))
def test_gradients_are_those_of_the_brute_force(case: Case) -> None:
    compare(case, torch.float64, gradients=True)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(case=packed_cases())
def test_packed_sequences_never_see_each_other(case: Case) -> None:
    compare(case, torch.float64, gradients=True)


@pytest.mark.parametrize("prompt_length", [*range(124, 134), 256, 299, 300])
def test_the_prompt_may_end_anywhere_in_a_block(prompt_length: int) -> None:
    mask = Case(rows=300, window=7, sinks=2, full_attention_decode=True)
    compare(replace(mask, prompt_length=prompt_length), torch.float64)


@pytest.mark.parametrize("scaling", [0.25, 1.0, 0.01])
def test_the_scaling_that_the_model_asks_for_is_used(scaling: float) -> None:
    for case in (Case(rows=40), Case(rows=1, cached=30), Case(rows=3, window=50)):
        compare(case, torch.float64, scaling=scaling)


def test_left_padding_moves_each_sequences_sinks() -> None:
    case = Case(rows=60, batch=3, window=5, sinks=3, left=(0, 11, 40), right=(0, 0, 0))
    compare(case, torch.float64)


def test_an_all_true_padding_mask_is_no_padding() -> None:
    case = Case(rows=30, batch=2, left=(0, 0), right=(0, 0))
    assert case.describe() == PLAIN.Rows(0)
    compare(case, torch.float64)


@pytest.mark.parametrize("sinks", [0, 4])
def test_long_rows_take_few_calls_and_read_only_the_keys_they_can_see(
    sinks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows whose window is not full yet, the blocks, and what rows are left between them."""
    calls = []

    def spy(query: torch.Tensor, key: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        calls.append((len(query), key.shape[2]))
        assert "enable_gqa" not in options
        return scaled_dot_product_attention(query, key, *rest, **options)

    for code in (KERNELS, HYBRID):
        monkeypatch.setattr(code, "scaled_dot_product_attention", spy)
    blocks, width = 7, BLOCK + 19 + sinks
    for more in (0, 60):
        calls.clear()
        case = Case(rows=20 + sinks + more + blocks * BLOCK, window=20, sinks=sinks, groups=2)
        case.found(case.states(torch.float32), None)
        assert calls[-1] == (blocks, width)
        # What grows is causal: each of the query heads that share a KV head is a batch.
        assert calls[:-1] == [(2, 20 + sinks)] + [(1, 60 + 19 + sinks)] * (more > 0)


def test_packed_generated_rows_are_refused() -> None:
    case = Case(rows=10, packed=((4, 6),), full_attention_decode=True)
    with pytest.raises(ValueError, match="one sequence per row"):
        case.found(case.states(torch.float64), None)


def test_a_mask_tensor_is_refused_with_the_remedy() -> None:
    case = Case(rows=4)
    with pytest.raises(ValueError, match=r"pass a 2-D attention_mask .* not a Tensor"):
        case.code.hybrid_attention(
            case.module, *case.states(torch.float64), torch.zeros(1, 1, 4, 4)
        )


def test_dropout_drops_weights_in_the_expected_share() -> None:
    case = Case(rows=400, window=64, head_dim=2)
    query, key, _ = (state.detach() for state in case.states(torch.float64))
    value = torch.ones_like(key)
    torch.manual_seed(0)
    output, _ = PLAIN.hybrid_attention(case.module, query, key, value, PLAIN.Rows(0), dropout=0.3)
    # Every output is the sum of the kept weights over 1 - p: 1 on average, and not always 1.
    assert abs(float(output.mean()) - 1.0) < 0.02
    assert float(output.std()) > 0.05
