"""Scoring is RULER's, on given strings."""

from __future__ import annotations

import importlib.util

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.evaluation.tasks.item import cleaned, score

# Prediction, references, share of all, best of any: worked out by hand from the definition.
BY_HAND = [
    ("The numbers are 12 and 34.", ("12", "34"), 1.0, 1.0),
    ("The number is 12.", ("12", "34"), 0.5, 1.0),
    ("", ("12",), 0.0, 0.0),
    ("BRAVE-LANTERN", ("brave-lantern",), 1.0, 1.0),
    ("1234567", ("123",), 1.0, 1.0),
    ("none of them", ("12", "34", "56", "78"), 0.0, 0.0),
    ("34", ("12", "34", "34"), 2 / 3, 1.0),
]


@pytest.mark.parametrize(("prediction", "references", "every", "best"), BY_HAND)
def test_scores_by_hand(
    prediction: str, references: tuple[str, ...], every: float, best: float
) -> None:
    assert score(prediction, references, "all") == pytest.approx(every)
    assert score(prediction, references, "part") == best


@given(st.text(), st.lists(st.text(min_size=1), min_size=1, max_size=4))
def test_scores_are_rulers_formula(prediction: str, references: list[str]) -> None:
    """The published formulas, over a hundredth: `sum(found) / len(ref)` and `max(found)`."""
    found = [1.0 if r.lower() in prediction.lower() else 0.0 for r in references]
    assert score(prediction, references, "all") == sum(found) / len(references)
    assert score(prediction, references, "part") == max(found)


def test_scores_are_those_of_the_harness() -> None:
    """lm-eval carries RULER's own scoring and clean-up."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed")
    from lm_eval.tasks.ruler.common_utils import postprocess_pred, string_match_all

    for prediction, references, _, _ in BY_HAND:
        for text in (prediction, f" \x07{prediction}\n\t", f"{prediction}\x1b[0m"):
            (expected,) = postprocess_pred([text])
            assert cleaned(text) == expected
            assert score(cleaned(text), references, "all") == string_match_all(
                [expected], [list(references)]
            )
