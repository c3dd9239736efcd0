"""Sentences that claim no more than the numbers show."""

from __future__ import annotations

from typing import Any

from converter.common.statistics import accuracy, paired_difference
from converter.evaluation.summary import findings


def summary(before: dict[str, list[float]], after: dict[str, list[float]]) -> dict[str, Any]:
    """What `findings` reads of a summary, from scores by task."""
    variants: dict[str, Any] = {"original": {"tasks": {}}, "hybrid": {"tasks": {}}}
    for task in before:
        for variant, scores in zip(variants.values(), (before[task], after[task]), strict=True):
            difference = vars(paired_difference(scores, before[task]))
            variant["tasks"][task] = {**vars(accuracy(scores)), "difference": difference}
    within = {"window_tokens": 16, "largest_logit_difference": {"hybrid": 0.0}}
    return {"variants": variants, "short_context": {**within, "limit": 1e-3, "ok": True}}


RIGHT, WRONG = [1.0] * 40, [0.0] * 40


def test_what_is_lost_is_said() -> None:
    said = findings(summary({"vt": RIGHT}, {"vt": WRONG[:20] + RIGHT[:20]}))
    assert said[0].startswith("The hybrid loses on vt: -0.500 [")
    assert said[-1] == (
        "Within 16 tokens every plan computes what the original does "
        "(largest logit difference 0.0e+00)."
    )


def test_what_is_not_clear_is_not_claimed() -> None:
    said = findings(summary({"vt": RIGHT, "kv": RIGHT}, {"vt": RIGHT, "kv": [*RIGHT[1:], 0.0]}))
    assert said[0].startswith("No clear change of accuracy on vt, kv:")


def test_a_task_that_the_original_fails_shows_nothing() -> None:
    said = findings(summary({"vt": WRONG}, {"vt": RIGHT}))
    assert said[0].startswith("The original itself answers almost nothing of vt (0.000 [0.000, ")
    assert not any("does better" in sentence or "No clear" in sentence for sentence in said)


def test_a_plan_that_breaks_its_window_is_said() -> None:
    value = summary({}, {})
    value["short_context"] |= {"ok": False, "largest_logit_difference": {"hybrid": 0.5}}
    (said,) = findings(value)
    assert "does not compute its mask" in said
    assert "5.0e-01" in said
