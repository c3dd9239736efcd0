"""Budgets: counts and fractions, rounded up to at least one layer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.budget import Budget, parse_budget
from converter.errors import PlanError

TOTALS = st.integers(1, 200)


@given(st.integers(1, 500), st.integers(1, 500), TOTALS)
def test_a_fraction_is_rounded_up_to_at_least_one(top: int, bottom: int, total: int) -> None:
    text = f"{top}/{bottom}"
    if top > bottom:
        with pytest.raises(PlanError, match="out of range"):
            parse_budget(text)
        return
    layers = parse_budget(text).layers(total)
    # The least count of layers that is no smaller a share than asked for, in whole numbers.
    assert layers * bottom >= top * total
    assert (layers - 1) * bottom < top * total
    assert 1 <= layers <= total


@given(st.integers(0, 300), TOTALS)
def test_a_count_is_taken_as_it_is(count: int, total: int) -> None:
    budget = parse_budget(str(count))
    if count <= total:
        assert budget.layers(total) == count
    else:
        with pytest.raises(PlanError, match="more full-attention layers than the model has"):
            budget.layers(total)


@given(st.integers(1, 1000), TOTALS)
def test_a_decimal_is_the_same_as_its_fraction(thousandths: int, total: int) -> None:
    decimal = f"{thousandths // 1000}.{thousandths % 1000:03}"
    assert parse_budget(decimal).layers(total) == parse_budget(f"{thousandths}/1000").layers(total)


@given(st.text() | st.from_regex(r"[0-9/.\-+e ]{1,12}", fullmatch=True))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        budget = parse_budget(text)
    except PlanError:
        return
    assert str(budget) == text.strip()
    assert budget.amount >= 0


@pytest.mark.parametrize(
    ("text", "total", "layers"),
    [
        ("1/4", 28, 7),
        ("1/4", 30, 8),
        ("1/4", 2, 1),
        ("0.25", 28, 7),
        (".5", 3, 2),
        ("1/1", 6, 6),
        ("1.0", 6, 6),
        (" 9 ", 36, 9),
        ("0", 36, 0),
    ],
)
def test_known_budgets(text: str, total: int, layers: int) -> None:
    assert parse_budget(text).layers(total) == layers


@pytest.mark.parametrize("text", ["", "a", "1/0", "-1", "-1/4", "1e2", "1/2/3", "9" * 5000, "nan"])
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        parse_budget(text)


@pytest.mark.parametrize("text", ["0/4", "0.0", "5/4", "1.01"])
def test_a_share_of_nothing_or_of_more_than_all_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="out of range"):
        parse_budget(text)


def test_a_budget_keeps_its_spelling() -> None:
    assert parse_budget("2/8") == Budget("2/8", parse_budget("1/4").amount)
