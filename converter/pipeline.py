"""The straight line: source -> scores -> plan -> checkpoint -> verification.

Each function takes frozen values and returns one; the command line calls these and prints. Whatever
is decided on the way is either an argument here or a setting (`converter.settings`).

`__all__` is what to import from Python, as docs/python.md tells; everything else may change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from converter.calibration.calibrate import Calibration, CalibrationTask
from converter.calibration.calibrate import calibrate as measure_scores
from converter.calibration.comparison import check_held_out, check_validation, within_bound
from converter.calibration.curve import Curve, curve_with, measure_choice, measure_curve
from converter.calibration.diagnostics import measure_controls
from converter.calibration.results import Quality
from converter.calibration.run import CalibrationRun, RunContext, open_run, placement_for
from converter.calibration.schedule import curve_stages, stages
from converter.calibration.scores import Scores, plan_of_scores
from converter.calibration.scores_file import load_scores
from converter.calibration.selectors import PERIODIC, nested, periodic_among
from converter.checkpoint.format import CURVE_FILE
from converter.checkpoint.reader import edited_card, open_checkpoint, scores_inside
from converter.checkpoint.verify.checks import verify
from converter.checkpoint.verify.report import Report
from converter.checkpoint.writer import check_replaceable, write_checkpoint
from converter.common.errors import HybridizeError, PlanError
from converter.common.files import restore_replaced
from converter.common.units import parse_bytes
from converter.engines.support import check_target, verdicts
from converter.model.source import Source, open_source
from converter.plan.plan import Plan, kv_bytes, layer_types_of
from converter.plan.units import LAYER, Units
from converter.publish.card import extra_files
from converter.settings import Settings

__all__ = [
    "Converted",
    "EarlierResults",
    "HybridizeError",
    "Plan",
    "RunContext",
    "Settings",
    "Source",
    "calibrate",
    "convert",
    "curve",
    "kv_bytes",
    "open_source",
    "plan",
    "retarget",
    "verdicts",
    "verify",
]


@dataclass(frozen=True)
class EarlierResults:
    """What an earlier run or the user decided already.

    Attributes:
        plan, scores: convert by this plan, or decide from these scores; nothing is measured.
        profiles: further plans that the checkpoint offers by name.
    """

    plan: Plan | None = None
    scores: Scores | None = None
    profiles: Mapping[str, Plan] = field(default_factory=dict)


@dataclass(frozen=True)
class Converted:
    """A finished conversion.

    Attributes:
        folder: the checkpoint; under a temporary name when its verification failed.
        plan: its plan.
        scores: what the plan was decided from, if it was measured.
        quality: held-out quality, if it was measured.
        curve: that of every number of full layers by the same order, if it was measured.
        report: the verification, if there was one.
        links: how each weight file got there.
    """

    folder: Path
    plan: Plan
    scores: Scores | None
    quality: Quality | None
    curve: Curve | None
    report: Report | None
    links: Mapping[str, str]


def calibrate(
    source: Source, settings: Settings, context: RunContext, *, controls: bool = False
) -> Calibration:
    """Measure what each layer's full attention is worth.

    Args:
        source: the model.
        settings: how, and on which examples; the budget says where scoring may stop.
        context: where progress is kept and shown.
        controls: measure also what the scores should and should not show.

    Raises:
        HybridizeError: bad input, or the disk refuses.
    """
    # Scores hold for one mask, so a mask that the target does not have is refused now.
    check_target(settings.target, source, settings.mask(source.shape), by_heads=settings.by_heads)
    task = settings.task(source.shape)
    run = calibration_run(
        source, replace(settings, holdout=0), context, comparing=settings.compares(source.shape)
    )
    context.schedule(stages(run, task, None))
    found = measure_scores(run, task, context.progress)
    if not controls:
        return found
    controlled = measure_controls(run, found.scores, context.progress)
    return replace(found, scores=replace(found.scores, controls=controlled.to_json()))


def plan(
    source: Source, settings: Settings, context: RunContext, scores: Scores | None = None
) -> Plan:
    """Choose the layers that keep full attention.

    Args:
        source: the model, which is run only where the budget is a loss.
        settings: `layers`, or `budget` with `method`.
        context: where progress is kept and shown.
        scores: what to decide from; None for a method that measures nothing.

    Raises:
        PlanError: the settings cannot be met.
        ScoresError: the scores belong to another model or mask.
    """
    settings.check_plan(source, scores)
    count = None
    if settings.loss_bound() is not None and scores is not None:
        settings = settings.under(scores.mask, scores.granularity)
        run = calibration_run(source, settings, context, comparing=True)
        count = _layers_within_loss(run, settings, scores, context)
    return _decide(source, settings, scores, count)


def curve(
    source: Source,
    settings: Settings,
    context: RunContext,
    context_tokens: int,
    scores: Scores | None = None,
) -> Curve:
    """What every number of full layers costs in quality, on the held-out examples.

    Plans are the fronts of each measured method's order, so they are nested, and the periodic ones
    at every offset.

    Args:
        source: the model.
        settings: of the run; the budget does not matter.
        context: where progress is kept and shown.
        context_tokens: the sequence that the cache is counted for.
        scores: whose order is taken; None measures those of the methods.

    Raises:
        ScoresError: the scores belong to another model or mask.
        DataError: there are no held-out examples.
    """
    if scores is not None:
        settings.check_scores(source, scores)
        settings = settings.under(scores.mask, scores.granularity)
    methods = nested(settings.selectors) if scores is None else ()
    run = calibration_run(source, settings, context, comparing=False)
    check_held_out(run.examples.held_out)
    context.schedule(curve_stages(run, methods))
    orders = {} if scores is None else {scores.method: scores.order}
    for method in methods:
        task = CalibrationTask((method,), run.units.total)
        orders[method.label] = measure_scores(run, task, context.progress).scores.order
    return measure_curve(run, orders, context_tokens, context.progress)


def convert(
    source: Source,
    out: Path,
    settings: Settings,
    earlier: EarlierResults,
    context: RunContext,
    *,
    force: bool = False,
    prove: bool | None = None,
) -> Converted:
    """Do whatever is left of a conversion, and rename the checkpoint when it is proved.

    Args:
        source: the model.
        out: the checkpoint's folder.
        settings: how to choose.
        earlier: what is decided already.
        context: where progress is kept and shown.
        force: replace an existing checkpoint.
        prove: run the checkpoint against the source before giving it its name; None proves when
            the model was measured, so that a conversion by a given plan only writes.

    Raises:
        HybridizeError: bad input, or the disk refuses.
    """
    check_replaceable(source, out, force=force)
    profiles = {n: _applied(source, settings, p) for n, p in earlier.profiles.items()}
    scores, quality, curve = earlier.scores, None, None
    if earlier.plan is not None:
        chosen, scores = _applied(source, settings, earlier.plan), None
    elif scores is not None or settings.layers is not None or settings.is_periodic:
        chosen = plan(source, settings, context, scores)
    else:
        chosen, scores, quality, curve = _measured(source, settings, context)
        prove = True if prove is None else prove
    chosen = chosen.offering(profiles)
    proof = partial(verify, against=source, device=settings.device, say=context.say)
    extras = extra_files(source, chosen, scores, quality, curve)
    links, report, folder = write_checkpoint(
        source,
        chosen,
        out,
        extras,
        None if scores is None else scores.fingerprint,
        copy=settings.copy,
        force=force,
        proof=proof if prove else None,
    )
    return Converted(folder, chosen, scores, quality, curve, report, links)


def retarget(checkpoint: Path, settings: Settings) -> Converted:
    """Rewrite a checkpoint's plan from the scores it carries; its weights are linked, not touched.

    Args:
        settings: `budget` or `layers`, `target` and `copy`.

    Raises:
        CheckpointError: the folder is not a checkpoint of ours.
        PlanError: a budget is asked for and the checkpoint carries no scores.
    """
    restore_replaced(checkpoint)
    source, old = open_checkpoint(checkpoint)
    path = scores_inside(checkpoint)
    scores = None if path is None else load_scores(path)
    if scores is None and settings.layers is None:
        raise PlanError(
            "the checkpoint carries no scores to choose layers by",
            where=checkpoint,
            next_step="name the layers with --layers 3,7,11, or convert the source again",
        )
    chosen = replace(
        _decide(source, settings.under(old.mask, settings.granularity), scores),
        profiles=old.profiles,
    )
    # Quality was measured for the old plan, so it does not go along; a curve does that has the new.
    curve = curve_with(checkpoint / CURVE_FILE, chosen)
    card = edited_card(checkpoint, source.weights.shards)
    extras = extra_files(source, chosen, scores, None, curve, card)
    measured = None if scores is None else scores.fingerprint
    links, report, folder = write_checkpoint(
        source, chosen, checkpoint, extras, measured, copy=settings.copy, force=True
    )
    return Converted(folder, chosen, scores, None, curve, report, links)


def _measured(
    source: Source, settings: Settings, context: RunContext
) -> tuple[Plan, Scores, Quality | None, Curve | None]:
    """A plan by a measurement, and what it and others cost on held-out examples, if any."""
    settings.check_plan(source)
    task = settings.task(source.shape)
    run = calibration_run(source, settings, context, comparing=settings.compares(source.shape))
    context.schedule(stages(run, task, settings.loss_bound()))
    scores = measure_scores(run, task, context.progress).scores
    count = _layers_within_loss(run, settings, scores, context)
    chosen = _decide(source, settings, scores, count)
    if not run.examples.held_out:
        return chosen, scores, None, None
    quality, curve = measure_choice(run, chosen, scores, context.progress)
    return chosen, scores, quality, curve


def calibration_run(
    source: Source, settings: Settings, context: RunContext, *, comparing: bool
) -> CalibrationRun:
    """What a measurement depends on, checked; `comparing` takes examples to compare choices on."""
    memory = None if settings.memory is None else parse_bytes(settings.memory)
    streaming, processes = memory is not None, context.processes
    placement = placement_for(settings.device, settings.dtype, processes, streaming=streaming)
    run = open_run(
        source,
        settings.mask(source.shape),
        settings.granularity or LAYER,
        settings.examples(source.shape, comparing=comparing),
        placement,
        memory,
        context,
        needs_gradients=any(one.needs_gradients for one in settings.selectors),
    )
    if settings.quick:
        context.say(
            f"quick: a first look, on prompts of at most {settings.prompt_tokens(source.shape):,} "
            "tokens; decide on the figures of a run without it"
        )
    if comparing:
        check_validation(run.examples)
    context.announce(run.examples)
    return run


def _layers_within_loss(
    run: CalibrationRun, settings: Settings, scores: Scores, context: RunContext
) -> int | None:
    """How many layers or KV heads a loss bound takes; None for another budget."""
    bound = settings.loss_bound()
    if bound is None:
        return None
    return len(within_bound(run, scores.order, bound, context.progress).found.layers)


def _decide(
    source: Source, settings: Settings, scores: Scores | None, count: int | None = None
) -> Plan:
    """The plan that settings and scores say; `count` is told where the budget is a loss."""
    if scores is not None:
        settings.check_scores(source, scores)
    if settings.layers is not None or settings.is_periodic:
        plan = _unmeasured(source, settings, scores)
    elif scores is None:
        raise PlanError(
            "a plan by score needs scores",
            where="--scores",
            next_step="measure them with: hybridize calibrate SOURCE --out scores.json, "
            "or choose --method periodic or --layers",
        )
    else:
        plan = plan_of_scores(source, scores, settings.parsed_budget(), count)
    check_target(settings.target, source, plan.mask, by_heads=plan.is_mixed)
    return plan


def _unmeasured(source: Source, settings: Settings, scores: Scores | None) -> Plan:
    """The plan of named layers, or of evenly spaced ones; scores may say what comes next."""
    shape, mask = source.shape, settings.mask(source.shape) if scores is None else scores.mask
    full, method, budget = settings.layers, "hand", None
    if full is None:
        wanted = settings.parsed_budget()
        count = wanted.count(Units(len(shape.full_layers)), shape, mask)
        full = periodic_among(shape.full_layers, count, settings.offset)
        method, budget = f"{PERIODIC.name}, offset {settings.offset}", str(wanted)
    ranking = None if scores is None else scores.layer_order
    kinds = layer_types_of(full, shape.layers, shape.kinds)
    return Plan(kinds, mask, method, budget, ranking, source.name, source.revision)


def _applied(source: Source, settings: Settings, given: Plan) -> Plan:
    """A plan from a file, for this source."""
    given.check_layers(source.shape, "--plan")
    given.mask.check_fits(source.shape.context_tokens)
    check_target(settings.target, source, given.mask, by_heads=given.is_mixed)
    return replace(given, source=source.name, revision=source.revision)
