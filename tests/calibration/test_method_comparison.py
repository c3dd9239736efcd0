"""Comparisons of methods: the winner, what may be said of it, and files that are damaged."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.calibration.calibrate import calibrate
from converter.calibration.comparison import Candidate, hold_contest, plans_cost
from converter.calibration.data.examples import Examples
from converter.calibration.results import ComparedPlan, MethodComparison, Outcome
from converter.calibration.scores import ExampleScores, Scores
from converter.calibration.scores_file import load_scores
from converter.common.errors import DataError, ScoresError
from converter.common.files import write_json
from converter.model.mask import Mask
from converter.plan.plan import layer_types_of
from tests.conftest import LAYERS
from tests.runners import MASKS, Plain, example_of, run, scoring, silent, watched

ORIGINAL = Outcome("original", (0, 1, 2, 3), (1.0, 2.0, 1.5), (True, False, True))


def entry(
    method: str, layers: tuple[int, ...], *nll: float, cost: float = 0.0, offset: int | None = None
) -> ComparedPlan:
    outcome = Outcome(method, layers, nll, tuple(x < 2 for x in nll), offset)
    return ComparedPlan(outcome, sum(nll) / len(nll), cost)


SEARCH = entry("search", (1, 3), 1.5, 2.5, 2.0, cost=40.5)
FIRST = entry("periodic", (0, 2), 2.0, 3.25, 2.5, offset=0)
SECOND = entry("periodic", (1, 3), 1.5, 2.5, 2.0, offset=1)


# --- the winner -------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_nobody_beats_the_winner_and_of_equals_the_first_wins(values: list[int]) -> None:
    entries = tuple(entry(f"method {i}", (i,), float(v)) for i, v in enumerate(values))
    comparison = MethodComparison(1, entries, ORIGINAL)
    winner = comparison.entry(comparison.winner)
    assert all(winner.value <= other.value for other in entries)
    assert comparison.winner == f"method {values.index(min(values))}"


def test_the_value_decides_that_an_earlier_version_gave() -> None:
    """Not the mean loss, where it had another objective."""
    fair = replace(entry("fair", (0, 1), 2.0, 2.0, 2.0), value=0.5)
    cheap = replace(entry("cheap", (0, 3), 1.0, 1.0, 3.0), value=1.5)
    assert MethodComparison(2, (cheap, fair), ORIGINAL).winner == "fair"


def test_who_was_given_up_early_does_not_win() -> None:
    """A low loss on few examples is luck; differences are of those that both were run on."""
    early, late = entry("early", (0, 1), 0.5), entry("late", (0, 3), 0.75, 1.0, 3.0)
    comparison = MethodComparison(2, (early, late, FIRST), ORIGINAL)
    assert [one.outcome.name for one in comparison.ranked][::2] == ["late", "early"]
    assert late.outcome.loss_above(early.outcome).mean == 0.25
    assert (
        MethodComparison.from_json(json.loads(json.dumps(comparison.to_json())), range(4))
        == comparison
    )


def often(once: ComparedPlan) -> ComparedPlan:
    """On examples enough for something to be claimed."""
    nll, correct = once.outcome.nll * 6, once.outcome.correct * 6
    return replace(once, outcome=replace(once.outcome, nll=nll, correct=correct))


# --- what may be said -------------------------------------------------------------------------


WORSE = entry("periodic", (1, 2), 9.0, 9.0, 9.0, offset=1)
CLOSE = entry("periodic", (0, 2), 1.5, 4.0, 2.25, offset=0)
CLEARLY = "The best periodic plan (periodic, offset 0) loses 0.583 ± 0.029 more than the winner."
UNSURE = "Nothing beats the best periodic plan (periodic, offset 0) beyond doubt"
ONE_EXAMPLE = (entry("search", (1, 3), 1.0), entry("periodic", (0, 2), 9.0, offset=0))


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        # A winner with the layers of a periodic plan, or that is one, has not paid.
        ((SEARCH, FIRST, SECOND), ["the layers of the best periodic plan (periodic, offset 1)"]),
        ((FIRST, SECOND), ["keeps the layers of the best periodic plan (periodic, offset 1)"]),
        # Losses above the winner: 0.5, 0.75, 0.5, six times over; their mean is 20 standard errors
        # from 0. It is held against the best offset.
        *(
            (tuple(map(often, entries)), [CLEARLY])
            for entries in ((SEARCH, FIRST), (SEARCH, WORSE, FIRST), (SEARCH, FIRST, WORSE))
        ),
        # Three examples tell nothing beyond doubt, however far their mean is from 0.
        ((SEARCH, FIRST), [UNSURE, "0.583 ± 0.083 above the winner"]),
        # Losses above the winner: 0, 1.5, 0.25; mean 0.583, standard error 0.464.
        (
            (SEARCH, CLOSE),
            [
                UNSURE,
                "0.583 ± 0.464 above the winner",
            ],
        ),
        (ONE_EXAMPLE, ["Nothing beats", "8.000 ± ?"]),
        ((SEARCH, CLOSE, WORSE), ["Not clearly worse than the winner: periodic, offset 0."]),
    ],
)
def test_what_may_be_said_of_a_winner(entries: tuple[ComparedPlan, ...], words: list[str]) -> None:
    examples = len(entries[0].outcome.nll)
    nll, correct = (ORIGINAL.nll * 6)[:examples], (ORIGINAL.correct * 6)[:examples]
    original = replace(ORIGINAL, nll=nll, correct=correct)
    found = MethodComparison(2, entries, original).conclusion()
    assert all(some in found for some in words)


# --- files ------------------------------------------------------------------------------------

COMPARISON = MethodComparison(2, (SEARCH, FIRST, SECOND), ORIGINAL)


def scores_with(comparison: Any) -> dict[str, Any]:
    example = ExampleScores("pair", 100, 4, None, 3.0, (0.5, 1.5, 1.0, 0.1))
    scores = Scores(
        "search", Mask(16), (example,), 24.5, {"source": "abc"}, (1, 3, 2, 0), comparison=COMPARISON
    )
    return scores.to_json() | {"contest": comparison}


def changed(**changes: Any) -> dict[str, Any]:
    return COMPARISON.to_json() | changes


def with_entry(**changes: Any) -> dict[str, Any]:
    *others, last = COMPARISON.to_json()["entries"]
    return changed(entries=[*others, last | changes])


def test_a_contest_is_read_back(tmp_path: Path) -> None:
    assert (
        MethodComparison.from_json(json.loads(json.dumps(COMPARISON.to_json())), range(4))
        == COMPARISON
    )
    write_json(tmp_path / "scores.json", scores_with(COMPARISON.to_json()))
    scores = load_scores(tmp_path / "scores.json")
    assert scores.comparison == COMPARISON
    # The front of the order is the winner's at the count it was held for, the method's elsewhere.
    assert scores.chosen_by(2) == "search"
    assert replace(scores, method="kl").chosen_by(2) == "search"
    assert replace(scores, method="kl").chosen_by(3) == "kl"


def test_the_file_says_who_won_and_what_it_cost() -> None:
    value = COMPARISON.to_json()
    assert (value["keep"], value["winner"]) == (2, "search")
    assert value["finding"] == COMPARISON.conclusion()
    search, first, _ = value["entries"]
    assert (search["value"], search["layer_forwards"]) == (2.0, 40.5)
    assert search["nll_above_winner"] == {"mean": 0.0, "stderr": 0.0}
    assert first["nll_above_winner"]["mean"] == pytest.approx(1.75 / 3)
    assert first["answers_right"]["accuracy"] == 0
    assert value["original"]["nll"] == [1.0, 2.0, 1.5]


@pytest.mark.parametrize(
    "comparison",
    [
        7,
        [],
        {},
        changed(keep=None),
        changed(keep="two"),
        changed(keep=3),
        changed(entries=[]),
        changed(entries=[1]),
        changed(entries=COMPARISON.to_json()["entries"][:1]),
        changed(original=None),
        changed(original={"name": "original"}),
        with_entry(full_attention_layers=[0, 4]),
        with_entry(full_attention_layers=[-1, 1]),
        with_entry(full_attention_layers=[1]),
        with_entry(full_attention_layers=[1, 1]),
        with_entry(full_attention_layers=3),
        with_entry(nll=[1.0]),
        with_entry(nll=[1.0, 2.0, "x"]),
        with_entry(nll=[1.0, 2.0, float("nan")]),
        with_entry(correct=[True]),
        with_entry(correct=None),
        with_entry(value=None),
        with_entry(value=float("nan")),
        with_entry(layer_forwards="many"),
        changed(
            original=COMPARISON.to_json()["original"] | {"nll": [], "correct": []},
            entries=[e | {"nll": [], "correct": []} for e in COMPARISON.to_json()["entries"]],
        ),
    ],
)
def test_a_damaged_contest_is_refused(comparison: Any, tmp_path: Path) -> None:
    """Rather than a file that later breaks what is printed of it."""
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(scores_with(comparison)))
    with pytest.raises(ScoresError, match="damaged") as caught:
        load_scores(path)
    assert caught.value.details["where"] == str(path)


# --- held by a calibration --------------------------------------------------------------------

KINDS = ("near", "far")
EXAMPLES = [replace(example_of(40 + i, 2, seed=5), kind=KINDS[i % 2]) for i in range(8)]


def contest_of(source: Path, work: Path, methods: str, keep: int = 2) -> Scores:
    """The scores of a contest: chosen on four examples, held on the other four."""
    examples = Examples(tuple(EXAMPLES[:4]), tuple(EXAMPLES[4:]), ())
    measured = replace(run(source, (), MASKS["sinks"], work), examples=examples)
    return calibrate(measured, scoring(methods, keep), silent).scores


@pytest.mark.usefixtures("exactly")
def test_entries_are_true_losses_on_the_examples_nobody_chose_on(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    scores = contest_of(sources["llama"], tmp_path, "nll-restore,search,periodic")
    comparison = scores.comparison
    assert comparison is not None
    assert comparison.keep == 2
    layers = {e.outcome.name: e.outcome.full for e in comparison.entries}
    # Every offset takes part, whatever was asked for.
    assert layers == layers | {"periodic, offset 0": (0, 2), "periodic, offset 1": (1, 3)}
    assert list(layers)[:2] == ["nll-restore", "search"]
    assert len(layers) == len(comparison.entries) == 4
    plain = Plain(sources["llama"], MASKS["sinks"])
    full = [plain.nll(e, layer_types_of(range(LAYERS), LAYERS)) for e in EXAMPLES[4:]]
    assert comparison.original.nll == pytest.approx(full, rel=0, abs=1e-9)
    best = min(comparison.entries, key=lambda e: e.value)
    assert comparison.winner == best.outcome.name
    for e in comparison.entries:
        nll = [plain.nll(x, layer_types_of(e.outcome.full, LAYERS)) for x in EXAMPLES[4:]]
        assert e.outcome.nll == pytest.approx(nll, rel=0, abs=1e-9)
        assert e.value == pytest.approx(sum(nll) / 4, rel=0, abs=1e-9)
        assert (e.layer_forwards > 0) == (e.outcome.offset is None)
    # What the plan is made of.
    assert set(scores.order[:2]) == set(best.outcome.full)
    assert sorted(scores.order) == list(range(LAYERS))


def test_a_periodic_plan_that_wins_leads_the_order_of_the_best_that_measures(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    """Laziness of random models is as good as drawn, so some offset beats it."""
    won = 0
    for number, method in enumerate(("lazy", "kl", "nll-remove", "path-integral")):
        alone = contest_of(sources["qwen2"], tmp_path / f"{number}", f"{method},periodic")
        comparison = alone.comparison
        assert comparison is not None
        assert alone.method == method
        assert set(alone.order[:2]) == set(comparison.entry(comparison.winner).outcome.full)
        assert alone.chosen_by(2) == comparison.winner
        if comparison.winner != method:
            won += 1
            # The rest keeps the method's own order.
            own = run(sources["qwen2"], EXAMPLES[:4], MASKS["sinks"], tmp_path / "own")
            mine = calibrate(own, scoring(method, 2), silent).scores.order
            rest = [layer for layer in mine if layer not in alone.order[:2]]
            assert list(alone.order[2:]) == rest
    assert won


@pytest.mark.usefixtures("exactly")
def test_what_is_not_clear_is_looked_at_on_more_examples_as_far_as_the_limit_allows(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    examples = tuple(example_of(40, 2, seed=i) for i in range(40))
    measured = run(sources["llama"], (), MASKS["sinks"], tmp_path)
    measured = replace(measured, examples=Examples(examples[:1], examples, ()))
    everything = tuple(range(LAYERS))
    plans = [Candidate("original", everything), Candidate("same", everything)]
    plans += [Candidate(f"{layer}", (layer,)) for layer in everything]

    def lengths(limit: float) -> list[int]:
        return [len(one.nll) for one in hold_contest(measured, plans, limit, silent).outcomes]

    # The first round is held whatever it costs, and the original is never given up.
    assert lengths(0.0) == [16] * 6
    original, same, *others = lengths(float("inf"))
    assert (original, same) == (40, 40)
    # Random models have no favourites: nobody is given up early.
    assert others == [40] * 4
    # Where the limit does not reach for all of them, the best ones go on.
    full, *sets = [frozenset(plan.full) for plan in plans[1:]]
    first = plans_cost(measured, [full, *sets], examples[:16])
    second = max(
        plans_cost(measured, [full, *three], examples[16:32]) for three in combinations(sets, 3)
    )
    found = hold_contest(measured, plans, first + second + 1e-6, silent).outcomes
    original, same, *others = (len(one.nll) for one in found)
    assert (original, same) == (32, 32)
    assert others.count(32) == 3
    losses = [(sum(one.nll[:16]), len(one.nll)) for one in found[2:]]
    assert [length for _, length in sorted(losses)] == sorted(others, reverse=True)


def test_what_it_took_counts_choosing_comparing_and_profiles(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    bars, progress = watched()
    examples = Examples(tuple(EXAMPLES[:4]), tuple(EXAMPLES[4:]), ())
    measured = replace(run(sources["llama"], (), MASKS["sinks"], tmp_path), examples=examples)
    task = scoring("nll-restore,kl", 2, by_kind=True)
    found = calibrate(measured, task, progress)
    restore, kl, contest, *_ = (bar.done for bar in bars)
    assert min(restore, kl, contest) > 0
    assert found.scores.layer_forwards == pytest.approx(sum(bar.done for bar in bars))
    assert found.naive == 4 * LAYERS * (LAYERS + 1)


@pytest.mark.parametrize("keep", [0, LAYERS])
def test_where_there_is_nothing_to_choose_there_is_no_contest(
    keep: int, sources: dict[str, Path], tmp_path: Path
) -> None:
    scores = contest_of(sources["qwen2"], tmp_path, "nll-restore,search", keep)
    assert scores.comparison is None
    assert sorted(scores.order) == list(range(LAYERS))


def test_a_contest_without_examples_of_its_own_is_refused(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    measured = run(sources["qwen2"], EXAMPLES[:4], MASKS["plain"], tmp_path)
    with pytest.raises(DataError, match="no example is left") as caught:
        calibrate(measured, scoring("nll-restore,search", 2), silent)
    assert caught.value.details["where"] == "--validation"
    assert caught.value.details["got"] == "all 4 usable examples are scored"
    # Before hours of scoring.
    assert list(tmp_path.rglob("*.jsonl")) == []
