"""Scores, and choices by them, on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from converter.cli.console import Console
from converter.common.statistics import FEWEST
from converter.model.mask import FULL

if TYPE_CHECKING:
    from converter.calibration.calibrate import Calibration
    from converter.calibration.diagnostics import Agreement, Inclusion
    from converter.calibration.results import MethodComparison
    from converter.calibration.scores import Drawn, Race, Scores
    from converter.plan.plan import Plan
    from converter.plan.units import Units


def show_calibration(
    console: Console, calibration: Calibration, agreement: Agreement | None
) -> None:
    """The scores, how sure the choice is, and what it all cost."""
    scores = calibration.scores
    show_scores(console, scores)
    console.print(
        f"{told_counts(scores.drawn) or f'{len(scores.examples)} examples'} in "
        f"{calibration.seconds:.1f} s, "
        f"{scores.layer_forwards:,.0f} layer-forwards; one pass for each of the "
        f"{scores.units} would take {calibration.naive:,}"
    )
    if scores.controls is not None:
        show_controls(console, scores.controls)
    if agreement is not None:
        show_agreement(console, agreement)


def told_counts(drawn: Mapping[str, Drawn]) -> str:
    """How many examples layers were scored and compared on; nothing for scores that do not know."""
    verbs = {"scored": "to score layers on", "validation": "to compare choices on"}
    return " and ".join(
        f"{one.got} examples{f' of {one.asked} asked for' * (one.got < one.asked)} {verbs[name]}"
        for name, one in drawn.items()
    )


def show_scores(console: Console, scores: Scores, plan: Plan | None = None) -> None:
    """Each layer's score, and how sure the choice is; with a plan, which layers it keeps."""
    from converter.calibration.diagnostics import inclusion
    from converter.calibration.figures import one_at_a_time
    from converter.calibration.selectors import SELECTORS

    keep = scores.race.keep if scores.race else None
    if plan is not None and plan.method == scores.method:
        keep = len(plan.units_in_full(scores.units))
    sure = len(scores.examples) >= FEWEST
    chosen = inclusion(scores, keep) if keep and scores.by_mean and sure else None
    if scores.units.of_heads:
        _show_head_scores(console, scores)
    else:
        _show_layer_scores(console, scores, plan, chosen)
    if chosen is not None:
        console.print(
            f"resampled examples choose the same {chosen.keep} {scores.units} "
            f"{chosen.same_set:.1%} of the time"
        )
    if not sure:
        console.print(
            f"{len(scores.examples)} examples are too few to say how surely {scores.units} are "
            "chosen"
        )
    if note := one_at_a_time(scores):
        console.print(note)
    if scores.race is not None:
        show_race(console, scores.race, scores.units, scores.numbers)
    if scores.heads is not None:
        console.table(
            ("layer", "gate of each KV head"),
            [
                (layer, "  ".join(f"{gate:.2f}" for gate in row))
                for layer, row in zip(sorted(scores.layer_order), scores.heads, strict=True)
            ],
        )
    if scores.comparison is not None:
        show_comparison(console, scores.comparison)
    if plan is not None:
        show_uncompared(console, scores, plan)
    selector = SELECTORS.get(scores.method)
    if selector is not None and selector.sums_to_gap:
        _show_sum(console, scores)


def _show_layer_scores(
    console: Console, scores: Scores, plan: Plan | None, chosen: Inclusion | None
) -> None:
    places = {layer: place for place, layer in enumerate(scores.order, start=1)}
    rows = []
    for place, (index, score) in enumerate(zip(scores.numbers, scores.estimates, strict=True)):
        row: list[object] = [index, score, len(scores.of_unit(place)), places[index]]
        if chosen is not None:
            row.append(f"{chosen.by_layer[place]:.3f}")
        if plan is not None:
            row.append("█ full" if plan.layer_types[index] == FULL else "· sliding")
        rows.append(row)
    columns = ["layer", f"{scores.method} ({scores.unit})", "examples"]
    columns.append("rank" if scores.by_mean else "place in its order")
    columns += [] if chosen is None else [f"among {chosen.keep} of resampled"]
    console.table(columns + ([] if plan is None else ["plan"]), rows)


def _show_head_scores(console: Console, scores: Scores) -> None:
    """A row for each layer, as there are too many KV heads for a row each."""
    means = scores.units.rows([score.mean for score in scores.estimates])
    rows = zip(sorted(scores.layer_order), means, strict=True)
    console.print(f"{scores.method} ({scores.unit}) of each KV head")
    console.table(
        ("layer", *map(str, range(scores.kv_heads))),
        [(layer, *(f"{mean:.3f}" for mean in row)) for layer, row in rows],
    )


def show_uncompared(console: Console, scores: Scores, plan: Plan) -> None:
    """Say so where a plan is of another size than those that were compared."""
    count, compared = len(plan.units_in_full(scores.units)), scores.comparison
    if compared is not None and count not in (compared.keep, len(scores.front(compared.keep))):
        console.print(
            f"Plans of {compared.keep} full {scores.units} were compared; the plan of {count} "
            f"follows the order of {scores.method} and was compared with nothing."
        )


def show_comparison(console: Console, comparison: MethodComparison) -> None:
    """Who chose which layers, how that did on examples nobody chose on, and what it cost."""
    winner, original = comparison.entry(comparison.winner).outcome, comparison.original
    console.print(
        f"plans of {comparison.keep} full {comparison.units} on up to {len(original.nll)} "
        "validation examples (NLL in nats per answer token, ± standard error; 95% intervals)"
    )
    rows = [
        (
            entry.outcome.name,
            entry.outcome.told,
            len(entry.outcome.nll),
            entry.outcome.loss_above(original),
            "chosen" if entry.outcome is winner else entry.outcome.loss_above(winner),
            entry.outcome.accuracy,
            f"{entry.layer_forwards:,.0f}" if entry.layer_forwards else "",
        )
        for entry in comparison.ranked
    ]
    columns = (
        "",
        f"full {comparison.units}",
        "examples",
        "above the original",
        "above the chosen",
        "answers right",
    )
    console.table((*columns, "layer-forwards by itself"), rows)
    console.print(comparison.conclusion())


def show_race(console: Console, race: Race, units: Units, numbers: Sequence[int]) -> None:
    """What a race decided, and what it left open."""
    rounds = ", ".join(f"{count} {units} on {examples}" for examples, count in race.rounds)
    left = race.open_layers(numbers)
    console.print(
        f"raced for {race.keep} {units} ({rounds} examples): "
        + (
            f"no clear decision between {units.told(left)}"
            if left
            else "every one decided (95% confidence over all comparisons)"
        )
    )


def _show_sum(console: Console, scores: Scores) -> None:
    """The check that is built into such scores."""
    total = sum(score.mean for score in scores.estimates)
    ends = scores.to_json()["nll"]
    gap = ends["sliding"]["mean"] - ends["full"]["mean"]
    console.print(f"the scores sum to {total:.3f}; all sliding is {gap:.3f} above all full")


def show_controls(console: Console, controls: Mapping[str, Any]) -> None:
    """What the controls found."""

    def number(value: float | None, form: str) -> str:
        return "cannot be measured here" if value is None else format(value, form)

    null = controls["null_largest"]
    console.pairs(
        [
            (
                "null: prompts within the window",
                f"largest score {number(null, '.3g')} on {controls['null_examples']} examples"
                + ("" if null in (None, 0.0) else ": FAILED, it must be 0"),
            ),
            (
                "evidence inside the window",
                "cannot be measured here"
                if controls["near_share"] is None
                else f"{controls['near_share']:.1%} of the scores left, "
                f"{controls['near_examples']} examples",
            ),
            (
                "rank correlation with generic sensitivity",
                number(controls["sensitivity_correlation"], ".2f"),
            ),
            ("rank correlation of split halves", number(controls["split_half"], ".2f")),
        ]
    )


def show_agreement(console: Console, agreement: Agreement) -> None:
    """How well each kind of examples agrees with itself, and every two of them with each other."""
    console.table(
        ("kind", "examples", "rank correlation of split halves"),
        [
            (
                kind.kind,
                kind.examples,
                "too few" if kind.split_half is None else f"{kind.split_half:.2f}",
            )
            for kind in agreement.kinds
        ],
    )
    if agreement.pairs:
        console.table(
            ("kinds", "rank correlation (95%)"),
            [
                (
                    " and ".join(pair.kinds),
                    f"{pair.correlation:.2f} [{pair.low:.2f}, {pair.high:.2f}]",
                )
                for pair in agreement.pairs
            ],
        )
    console.print(agreement.conclusion())
