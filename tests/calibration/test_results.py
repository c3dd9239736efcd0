"""Quality on held-out examples: paired numbers, and sentences that claim no more than they show."""

from __future__ import annotations

import math
import statistics

import pytest

from converter.calibration.results import Outcome, Quality


def outcome(name: str, layers: tuple[int, ...], *nll: float) -> Outcome:
    method, _, offset = name.partition(", offset ")
    right = tuple(value < 1 for value in nll)
    return Outcome(method, layers, nll, right, int(offset) if offset else None)


def often(name: str, layers: tuple[int, ...], *nll: float) -> Outcome:
    """On examples enough for something to be claimed."""
    return outcome(name, layers, *nll * 4)


ORIGINAL = often("original", (0, 1, 2, 3), 0.1, 0.2, 0.3, 0.4)
HYBRID = often("hybrid", (1,), 0.3, 0.4, 0.5, 0.8)
FORGETS = often("all sliding", (), 4.0, 5.0, 4.5, 5.5)
KEEPS = often("all sliding", (), 0.5, 0.1, 0.2, 0.5)
WORSE = often("periodic, offset 0", (0,), 2.3, 2.5, 2.4, 2.9)
EQUAL = often("periodic, offset 2", (2,), 0.2, 0.6, 0.4, 0.9)
BETTER = often("periodic, offset 3", (3,), 0.1, 0.2, 0.3, 0.5)
SAME = often("periodic, offset 1", (1,), 0.3, 0.4, 0.5, 0.8)


def test_differences_are_paired() -> None:
    differences = [b - a for a, b in zip(ORIGINAL.nll, HYBRID.nll, strict=True)]
    found = HYBRID.loss_above(ORIGINAL)
    assert found.mean == pytest.approx(statistics.mean(differences))
    assert found.stderr == pytest.approx(statistics.stdev(differences) / math.sqrt(16))
    # Far below the error of either mean: the same examples are easy or hard for both.
    assert HYBRID.loss.stderr is not None and found.stderr is not None
    assert found.stderr < HYBRID.loss.stderr


def test_a_clear_win_needs_no_words() -> None:
    assert Quality(ORIGINAL, HYBRID, (FORGETS, WORSE)).findings() == []


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ((KEEPS, WORSE), "hardly need long range"),
        ((FORGETS, WORSE, BETTER), "offset 3, chosen without measuring, does better"),
        ((FORGETS, WORSE, EQUAL), "no clear difference"),
        ((FORGETS, WORSE, SAME), "This plan is the periodic one at offset 1"),
    ],
)
def test_what_is_doubtful_is_said(others: tuple[Outcome, ...], words: str) -> None:
    (finding,) = Quality(ORIGINAL, HYBRID, others).findings()
    assert words in finding


def test_nothing_is_claimed_on_few_examples() -> None:
    plans = [outcome(o.name, o.full, *o.nll[:4]) for o in (ORIGINAL, HYBRID, BETTER)]
    (finding,) = Quality(plans[0], plans[1], (plans[2],)).findings()
    assert finding.startswith("4 examples are too few to tell this plan from the best periodic")


def test_a_task_that_the_original_cannot_do_is_told_from_one_without_long_range() -> None:
    lost = Outcome("original", (0, 1, 2, 3), ORIGINAL.nll, (False,) * 16, None)
    (finding,) = Quality(lost, HYBRID, (KEEPS, WORSE)).findings()
    assert "none of the 16 answers right" in finding and "hardly" not in finding


def test_the_saved_form_has_every_outcome_with_its_examples() -> None:
    value = Quality(ORIGINAL, HYBRID, (FORGETS,)).to_json()
    assert value["examples"] == 16
    original, hybrid, sliding = value["outcomes"]
    names = (original["name"], hybrid["name"], sliding["name"])
    assert names == ("original", "hybrid", "all sliding")
    assert hybrid["per_example"] == {
        "nll": [0.3, 0.4, 0.5, 0.8] * 4,
        "correct": [True] * 16,
    }
    assert hybrid["answers_right"]["n"] == 16
    assert original["nll_above_original"] == {"mean": 0.0, "stderr": 0.0}
