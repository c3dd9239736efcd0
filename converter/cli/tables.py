"""How results look on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from converter.cli.console import Console
from converter.common.statistics import FEWEST
from converter.common.units import human_bytes
from converter.model.mask import FULL

if TYPE_CHECKING:
    from converter.calibration.calibrate import Calibration
    from converter.calibration.curve import Curve, Point
    from converter.calibration.data.examples import Examples
    from converter.calibration.diagnostics import Agreement
    from converter.calibration.results import MethodComparison, Quality
    from converter.calibration.scores import Drawn, Race, Scores
    from converter.checkpoint.verify.report import Report
    from converter.engines.vllm import VllmCache
    from converter.model.dimensions import ModelDimensions
    from converter.plan.plan import Plan

_ON_FRONT = "●"
# Rows of many shapes are dropped for many reasons; the most frequent are told.
_REASONS = 5


def say_counts(console: Console, examples: Examples) -> None:
    """How many examples there are, set by set, and why rows were dropped."""
    _say_rows(console, "examples", examples, reasons=not examples.sets)
    for name, part in examples.sets.items():
        _say_rows(console, f"  {name}", part, reasons=True)


def _say_rows(console: Console, name: str, examples: Examples, *, reasons: bool) -> None:
    kept = len(examples.all)
    told = (
        f"{name}: {kept} of {examples.looked_at} rows kept "
        f"({len(examples.scored)} to score layers on, "
        + f"{len(examples.validation)} to compare choices on, " * bool(examples.validation)
        + f"{len(examples.held_out)} held out)"
    )
    if kept < sum(examples.asked):
        asked = " + ".join(map(str, filter(None, examples.asked)))
        console.warn(f"{told}, where {asked} were asked for: {examples.remedy}")
    else:
        console.say(told)
    margin = " " * (len(name) - len(name.lstrip()) + 2)
    for reason, count in list(examples.dropped.items())[:_REASONS] if reasons else ():
        console.say(f"{margin}dropped: {reason}: {count}")
    if reasons and len(examples.dropped) > _REASONS:
        console.say(f"{margin}and for {len(examples.dropped) - _REASONS} more reasons")


def show_plan(
    console: Console,
    plan: Plan,
    shape: ModelDimensions,
    context_tokens: int,
    vllm: VllmCache | None = None,
) -> None:
    """The strip, what was chosen, and what it costs, in vLLM too where that is given."""
    from converter.plan.plan import kv_bytes

    cost = kv_bytes(plan, shape, context_tokens)
    kept = plan.full_attention_layers
    others = "" if len(kept) == len(plan.layer_types) or not shape.kinds else "  - as it is"
    console.print(f"{plan.strip}   █ full attention  · sliding{others}")

    def share(size: int) -> str:
        full = cost["full"]
        return f"{human_bytes(size)} instead of {human_bytes(full)} ({size / full:.0%})"

    rows = [
        (
            "full layers",
            f"{', '.join(map(str, kept)) or 'none'} ({len(kept)} of {len(shape.full_layers)})",
        ),
        ("sliding layers see", str(plan.mask)),
        ("chosen by", plan.method + (f", budget {plan.budget}" if plan.budget else "")),
        (f"KV cache at {context_tokens:,} tokens", share(cost["hybrid"])),
    ]
    if vllm is not None:
        rows.append(("in vLLM", f"{share(vllm.bytes)}: {vllm.layers_held}"))
        if vllm.better:
            rows.append(("better there", f"{' or '.join(map(str, vllm.better))} full layers"))
    console.pairs(rows)


def show_calibration(
    console: Console, calibration: Calibration, agreement: Agreement | None
) -> None:
    """The scores, how sure the choice is, and what it all cost."""
    scores = calibration.scores
    show_scores(console, scores)
    naive = len(scores.examples) * scores.layer_count * (scores.layer_count + 1)
    console.print(
        f"{told_counts(scores.drawn) or f'{len(scores.examples)} examples'} in "
        f"{calibration.seconds:.1f} s, "
        f"{scores.layer_forwards:,.0f} layer-forwards; one pass for each layer would take {naive:,}"
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
        keep = len(plan.full_attention_layers)
    places = {layer: place for place, layer in enumerate(scores.order, start=1)}
    sure = len(scores.examples) >= FEWEST
    chosen = inclusion(scores, keep) if keep and scores.by_mean and sure else None
    rows = []
    for place, (index, score) in enumerate(zip(scores.full_layers, scores.layers, strict=True)):
        row: list[object] = [index, score, len(scores.of_layer(place)), places[index]]
        if chosen is not None:
            row.append(f"{chosen.by_layer[place]:.3f}")
        if plan is not None:
            row.append("█ full" if plan.layer_types[index] == FULL else "· sliding")
        rows.append(row)
    columns = ["layer", f"{scores.method} ({scores.unit})", "examples"]
    columns.append("rank" if scores.by_mean else "place in its order")
    columns += [] if chosen is None else [f"among {chosen.keep} of resampled"]
    console.table(columns + ([] if plan is None else ["plan"]), rows)
    if chosen is not None:
        console.print(
            f"resampled examples choose the same {chosen.keep} layers {chosen.same_set:.1%} of the "
            "time"
        )
    if not sure:
        console.print(
            f"{len(scores.examples)} examples are too few to say how surely layers are chosen"
        )
    if note := one_at_a_time(scores):
        console.print(note)
    if scores.race is not None:
        show_race(console, scores.race, scores.full_layers)
    if scores.heads is not None:
        console.table(
            ("layer", "gate of each KV head"),
            [
                (layer, "  ".join(f"{gate:.2f}" for gate in row))
                for layer, row in zip(scores.full_layers, scores.heads, strict=True)
            ],
        )
    if scores.comparison is not None:
        show_comparison(console, scores.comparison)
    if plan is not None:
        show_uncompared(console, scores, plan)
    selector = SELECTORS.get(scores.method)
    if selector is not None and selector.sums_to_gap:
        _show_sum(console, scores)


def show_uncompared(console: Console, scores: Scores, plan: Plan) -> None:
    """Say so where a plan is of another size than those that were compared."""
    count = len(plan.full_attention_layers)
    if scores.comparison is not None and scores.comparison.keep != count:
        console.print(
            f"Plans of {scores.comparison.keep} full layers were compared; the plan of {count} "
            f"follows the order of {scores.method} and was compared with nothing."
        )


def show_comparison(console: Console, comparison: MethodComparison) -> None:
    """Who chose which layers, how that did on examples nobody chose on, and what it cost."""
    winner, original = comparison.entry(comparison.winner).outcome, comparison.original
    console.print(
        f"plans of {comparison.keep} full layers on up to {len(original.nll)} validation examples "
        "(NLL in nats per answer token, ± standard error; 95% intervals)"
    )
    rows = [
        (
            entry.outcome.name,
            ", ".join(map(str, entry.layers)),
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
        "full layers",
        "examples",
        "above the original",
        "above the chosen",
        "answers right",
    )
    console.table((*columns, "layer-forwards by itself"), rows)
    console.print(comparison.conclusion())


def show_race(console: Console, race: Race, layers: Sequence[int]) -> None:
    """What a race decided, and what it left open."""
    rounds = ", ".join(f"{layers} layers on {examples}" for examples, layers in race.rounds)
    left = race.open_layers(layers)
    console.print(
        f"raced for {race.keep} layers ({rounds} examples): "
        + (
            f"no clear decision between {', '.join(map(str, left))}"
            if left
            else "every layer decided (95% confidence over all comparisons)"
        )
    )


def _show_sum(console: Console, scores: Scores) -> None:
    """The check that is built into such scores."""
    total = sum(score.mean for score in scores.layers)
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


def show_quality(console: Console, quality: Quality) -> None:
    """The hybrid beside the original and what it must beat."""
    console.print(
        f"on {len(quality.original.nll)} held-out examples (NLL in nats per answer token, "
        "± standard error; 95% intervals)"
    )
    console.table(
        ("", "answer NLL", "above the original", "answers right"),
        [
            (
                outcome.name,
                outcome.loss,
                "" if outcome is quality.original else outcome.loss_above(quality.original),
                outcome.accuracy,
            )
            for outcome in quality.outcomes
        ],
    )
    for finding in quality.findings():
        console.print(finding)


def show_report(console: Console, report: Report) -> None:
    """The checks of a verification that failed; all of them where more talk is wanted."""
    checks = [check for check in report.checks if not check.ok or console.verbosity > 0]
    if not checks:
        return

    def text(value: object) -> str:
        return f"{value:.2e}" if isinstance(value, float) else str(value)

    console.table(
        ("", "check", "found", "held against"),
        [
            ("ok" if check.ok else "FAILED", check.name, text(check.value), text(check.limit))
            for check in checks
        ],
    )


def show_curve(console: Console, curve: Curve) -> None:
    """Every chosen plan by number of full layers, beside the evenly spaced ones of that number."""
    periodic = curve.periodic()
    chosen = [point for point in curve.points if not point.is_periodic]
    # A number that only evenly spaced plans were measured for still has its row.
    counts = {point.count for point in chosen}
    chosen += [group[0] for count, group in periodic.items() if count not in counts]
    console.print(
        f"measured on {curve.examples} examples (NLL in nats per answer token, ± standard error; "
        f"95% intervals), KV cache at {curve.context_tokens:,} tokens"
    )
    console.table(
        (
            *("full layers", "chosen by", "KV cache", "of the original", "above the original"),
            *("answers right", "front", "evenly spaced, best", "evenly spaced, worst"),
        ),
        [
            (
                point.count,
                point.name,
                human_bytes(point.kv_bytes),
                f"{point.kv_share:.0%}",
                "" if point is curve.original else point.loss,
                point.right,
                _ON_FRONT if point.on_front else "",
                *_beside(periodic.get(point.count, ())),
            )
            for point in sorted(chosen, key=lambda point: point.count)
        ],
    )
    console.print(
        f"{_ON_FRONT} on the front: any other plan with as few full layers loses more, by its mean"
    )
    console.print(curve.advice.reason)


def _beside(group: tuple[Point, ...]) -> tuple[str, str]:
    """The losses of the best and the worst offset; no texts where there are none."""
    if not group:
        return "", ""
    best, worst = group[0], group[-1]
    return f"{best.loss}{' ' + _ON_FRONT if best.on_front else ''}", str(worst.loss)
