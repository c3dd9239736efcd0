"""Masks: what is allowed, what fits, and what is read back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.common.errors import PlanError
from converter.model.mask import Mask

MASKS = st.builds(Mask, st.integers(1, 10**6), st.integers(0, 10**4), st.booleans())


@given(MASKS)
def test_a_mask_survives_json(mask: Mask) -> None:
    assert Mask.from_json(json.loads(json.dumps(mask.to_json())), "here") == mask


@given(MASKS)
def test_only_a_bare_window_of_two_or_more_is_plain(mask: Mask) -> None:
    bare = mask == Mask(mask.window_tokens)
    assert mask.is_plain_window == (bare and mask.window_tokens >= 2)


@given(MASKS, st.integers(-3, 3))
def test_a_mask_fits_when_some_token_is_hidden(mask: Mask, slack: int) -> None:
    context = mask.window_tokens + mask.sink_tokens + slack
    if slack >= 1:
        mask.check_fits(context)
    else:
        with pytest.raises(PlanError, match="as long as the model's context"):
            mask.check_fits(context)


@pytest.mark.parametrize(
    ("window", "sinks", "problem"), [(0, 0, "too small"), (-1, 0, "too small"), (8, -1, "negative")]
)
def test_sizes_that_make_no_mask_are_refused(window: int, sinks: int, problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        Mask(window, sinks)


GOOD = {"window_tokens": 8, "sink_tokens": 0, "full_attention_decode": False}


@pytest.mark.parametrize(
    "value",
    [
        *(None, [8, 0, False], {}, {"window_tokens": 8}),
        GOOD | {"extra": 1},
        *(GOOD | {"window_tokens": value} for value in ("8", 8.0, True, 0)),
        GOOD | {"sink_tokens": None},
        GOOD | {"full_attention_decode": 0},
    ],
)
def test_what_is_no_mask_is_refused(value: Any) -> None:
    with pytest.raises(PlanError):
        Mask.from_json(value, "plan.json")


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (Mask(8), "window 8"),
        (Mask(8, 2), "window 8, 2 sinks"),
        (Mask(8, 0, True), "window 8, full attention in decode"),
        (Mask(8, 2, True), "window 8, 2 sinks, full attention in decode"),
    ],
)
def test_a_mask_says_what_it_does(mask: Mask, text: str) -> None:
    assert str(mask) == text
