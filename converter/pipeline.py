"""The straight line: source -> scores -> plan -> checkpoint -> verification."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from converter.calibration.calibrate import Task, calibrate
from converter.calibration.comparison import (
    QUALITY,
    check_validation,
    measure_quality,
    outcomes,
    periodic_candidates,
    within_bound,
)
from converter.calibration.curve import Curve, build_curve
from converter.calibration.data.sources import DataSettings, Examples, load_examples, near_examples
from converter.calibration.distributed import ALONE, Processes
from converter.calibration.evaluator import ScoringOptions
from converter.calibration.figures import pictures
from converter.calibration.objective import Objective
from converter.calibration.results import Quality
from converter.calibration.run import CalibrationRun
from converter.calibration.scores import Scores, load_scores
from converter.calibration.selectors import SELECTORS, methods_of
from converter.checkpoint.format import CARD_FILE, QUALITY_FILE, SCORES_FILE
from converter.checkpoint.verify.checks import VerifySettings, open_checkpoint, verify
from converter.checkpoint.verify.report import Report
from converter.checkpoint.writer import check_replaceable, fill
from converter.common.errors import DataError, PlanError, UsageError
from converter.common.files import building, finish_folder, restore_replaced, to_text
from converter.common.progress import Progress
from converter.common.units import parse_bytes
from converter.decide import (
    check_plan_settings,
    check_scores,
    choose_length,
    choose_mask,
    chosen_budget,
    decide,
    needs_scores,
    scores_needed,
)
from converter.engines.support import check_target
from converter.inference.load import SPREAD, Placement, resolve_placement
from converter.inference.tokenizer import load_tokenizer
from converter.model.dimensions import check_token
from converter.model.mask import Mask
from converter.model.source import Source
from converter.plan.budget import NllBudget
from converter.plan.plan import Plan
from converter.publish.card import render_card
from converter.settings import Settings


@dataclass(frozen=True)
class EarlierResults:
    """What an earlier run or the user decided already.

    Attributes:
        plan: convert by this plan; nothing is measured.
        scores: decide from these scores.
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
        report: the verification, if there was one.
        links: how each weight file got there.
    """

    folder: Path
    plan: Plan
    scores: Scores | None
    quality: Quality | None
    report: Report | None
    links: Mapping[str, str]


@dataclass(frozen=True)
class RunContext:
    """How a run keeps and shows its progress.

    Attributes:
        folder: for what must survive a kill.
        fresh: forget what an earlier run left there.
        progress: shows how far a loop is.
        announce: is told which examples will be measured on.
        say: is told what else was decided on the way.
        processes: those that share the work.
    """

    folder: Path
    fresh: bool
    progress: Progress
    announce: Callable[[Examples], None]
    say: Callable[[str], None]
    processes: Processes = ALONE


def calibration_run(
    source: Source, settings: Settings, work: RunContext, *, comparing: bool
) -> CalibrationRun:
    """Gather the examples and all else that a measurement depends on.

    Args:
        source: the model.
        settings: of the run.
        work: where progress is kept.
        comparing: whether choices will be held against each other.

    Raises:
        PlanError: the mask does not fit the model.
        DataError: no usable examples, or none to compare on.
        SourceError: the tokenizer cannot be loaded, or does not belong to the model.
        UsageError: the device does not exist here, the length does not fit the model, or the model
            the memory.
    """
    mask = choose_mask(settings, source.shape)
    data = DataSettings(
        data=settings.data,
        samples=settings.samples,
        validation=settings.validation if comparing else 0,
        holdout=settings.holdout,
        length_tokens=choose_length(settings, source.shape),
        min_answer_tokens=settings.min_answer,
        max_answer_tokens=settings.max_answer,
        seed=settings.seed,
    )
    placement = _placement(settings, work.processes)
    memory = None if settings.memory is None else parse_bytes(settings.memory)
    tokenizer = load_tokenizer(source.folder)
    examples = load_examples(
        tokenizer, data, mask, source.shape.layers, source.shape.context_tokens
    )
    if comparing:
        check_validation(examples)
    largest = max(max(*e.prompt, *e.answer) for e in examples.all)
    check_token(largest, source.shape.vocabulary, source.folder)
    run = CalibrationRun(
        source=source,
        examples=examples,
        mask=mask,
        placement=placement,
        memory_bytes=memory,
        work=work.folder,
        fresh=work.fresh,
        processes=work.processes,
        say=work.say,
        near_examples=partial(
            near_examples, tokenizer, data, mask, source.shape.layers, source.shape.context_tokens
        ),
    )
    # Too little memory is said now, not after the first hour.
    run.memory_plan(gradient=False)
    methods = [SELECTORS[name] for name in methods_of(settings.method) if name in SELECTORS]
    if settings.screen or any(selector.needs_gradients for selector in methods):
        run.memory_plan(gradient=True)
    work.announce(examples)
    return run


def under(settings: Settings, mask: Mask) -> Settings:
    """The settings with another mask."""
    return replace(
        settings,
        window=mask.window_tokens,
        sinks=mask.sink_tokens,
        full_decode=mask.full_attention_decode,
    )


def quality_curve(
    source: Source, settings: Settings, scores: Scores | None, work: RunContext, context_tokens: int
) -> Curve:
    """What every number of full layers costs in quality, on the held-out examples.

    Plans are the fronts of each measured method's order, so they are nested, and the periodic ones
    at every offset.

    Args:
        source: the model.
        settings: of the run; the budget does not matter.
        scores: whose order is taken; None measures those of the methods.
        work: where progress is kept.
        context_tokens: the sequence that the cache is counted for.

    Raises:
        ScoresError: the scores belong to another model or mask.
        DataError: there are no held-out examples.
    """
    total = source.shape.layers
    if scores is not None:
        check_scores(source, settings, scores)
        settings = under(settings, scores.mask)
    methods = nested_methods(settings) if scores is None else []
    run = calibration_run(source, settings, work, comparing=False)
    held_out = run.examples.held_out
    if not held_out:
        raise DataError("there are no held-out examples to measure quality on", where="--holdout")
    if scores is not None:
        orders = {scores.method: scores.order}
    else:
        tasks = [
            Task((name,), total, objective=Objective(settings.objective), seed=settings.seed)
            for name in methods
        ]
        orders = {
            task.methods[0]: calibrate(run, task, work.progress).scores.order for task in tasks
        }
    candidates = [("original", tuple(range(total))), ("all sliding", ())]
    for count in range(1, total):
        candidates += [(name, order[:count]) for name, order in orders.items()]
        candidates += periodic_candidates(total, count)
    original, *others = outcomes(run, held_out, QUALITY, candidates, work.progress)
    return build_curve(original, others, source.shape, run.mask, context_tokens)


def _placement(settings: Settings, processes: Processes) -> Placement:
    """Where this process runs the model; processes of one machine take its GPUs in turn."""
    import torch

    if settings.device == SPREAD and (settings.memory is not None or processes.count > 1):
        raise UsageError(
            "a model spread over devices is loaded whole, by one process",
            where=f"--device {SPREAD}",
            got="also --memory" if settings.memory is not None else "torchrun",
        )
    placement = resolve_placement(settings.device, settings.dtype, may_spread=True)
    if placement.device == "cuda" and processes.count > 1:
        device = f"cuda:{processes.local_rank % torch.cuda.device_count()}"
        return replace(placement, device=device)
    return placement


def compares(source: Source, settings: Settings) -> bool:
    """Whether choices are held against each other: of several methods, or with the original."""
    if isinstance(chosen_budget(settings), NllBudget):
        return True
    several = len(methods_of(settings.method)) > 1
    return several and 0 < layers_kept(source, settings) < source.shape.layers


def nested_methods(settings: Settings) -> list[str]:
    """Those of the methods whose order serves every number of full layers.

    Raises:
        UsageError: there are none.
    """
    names = [name for name in methods_of(settings.method) if name in SELECTORS]
    nested = [name for name in names if SELECTORS[name].nested]
    if not nested:
        raise UsageError(
            "plans for several numbers of layers need one order of the layers, and this makes none",
            where="--method",
            expected="one that does, such as search",
            got=settings.method,
        )
    return nested


def layers_kept(source: Source, settings: Settings) -> int:
    """How many layers will be full; all of them where a loss bound will decide.

    Raises:
        PlanError: the budget cannot be read or met.
    """
    budget = chosen_budget(settings)
    if isinstance(budget, NllBudget):
        return source.shape.layers
    return budget.layers(source.shape, choose_mask(settings, source.shape))


def task_of(settings: Settings, source: Source) -> Task:
    """What the settings want found out: by a race, where a single method scores layers.

    Raises:
        PlanError: the budget cannot be read or met.
    """
    methods = methods_of(settings.method)
    keep = layers_kept(source, settings)
    if isinstance(chosen_budget(settings), NllBudget):
        # One order has to serve every count: that of the last method that has one.
        methods = (nested_methods(settings)[-1],)
    return Task(
        methods=methods,
        keep=keep,
        effort=ScoringOptions(
            race=len(methods) == 1 and not settings.exact, screen=settings.screen
        ),
        objective=Objective(settings.objective),
        by_kind=settings.profiles,
        seed=settings.seed,
    )


def bound_count(
    source: Source, settings: Settings, scores: Scores | None, work: RunContext
) -> int | None:
    """How many layers a loss bound takes, by running the model; None for another budget.

    Raises:
        PlanError: there is no ranking to take the layers from.
    """
    if settings.layers is not None or not isinstance(chosen_budget(settings), NllBudget):
        return None
    check_plan_settings(source, settings)
    if scores is None:
        raise scores_needed()
    check_scores(source, settings, scores)
    run = calibration_run(source, under(settings, scores.mask), work, comparing=True)
    return count_within(run, settings, scores, work)


def count_within(
    run: CalibrationRun, settings: Settings, scores: Scores, work: RunContext
) -> int | None:
    """How many layers a loss bound takes, and says so; None for another budget."""
    budget = chosen_budget(settings)
    if not isinstance(budget, NllBudget):
        return None
    objective = Objective(settings.objective)
    found = within_bound(run, scores.order, budget.bound, objective, work.progress)
    count = len(found.found.layers)
    losses = ", ".join(
        f"{len(one.layers)}: {one.loss - found.full.loss:+.3f}" for one in found.measured
    )
    work.say(
        f"{count} full layers keep within {budget.bound} nats of the original on "
        f"{len(run.examples.validation)} examples (loss above it by full layers: {losses})"
    )
    return count


def convert(
    source: Source,
    out: Path,
    settings: Settings,
    given: EarlierResults,
    work: RunContext,
    *,
    force: bool,
    verifying: bool | None,
) -> Converted:
    """Do whatever is left of a conversion, and rename the checkpoint when it is proved.

    Args:
        source: the model.
        out: the checkpoint's folder.
        settings: how to choose.
        given: what is decided already.
        work: where progress is kept.
        force: replace an existing checkpoint.
        verifying: run the checkpoint against the source before giving it its name; None verifies
            when the model was measured, so that a conversion by a given plan only writes.

    Raises:
        HybridizeError: bad input, or the disk refuses.
    """
    check_replaceable(source, out, force=force)
    for profile in given.profiles.values():
        check_given_plan(source, settings, profile)
    decided = _decide(source, settings, given, work)
    plan = with_profiles(decided.plan, given.profiles)
    decided = replace(decided, plan=plan)
    if verifying is None:
        verifying = decided.measured
    return _write(source, out, decided, force=force, verifying=verifying)


@dataclass(frozen=True)
class _Decided:
    """A plan, what it was decided from, and whether this run measured that."""

    plan: Plan
    scores: Scores | None = None
    quality: Quality | None = None
    measured: bool = False


def _decide(
    source: Source, settings: Settings, given: EarlierResults, work: RunContext
) -> _Decided:
    if given.plan is not None:
        return _Decided(check_given_plan(source, settings, given.plan))
    if given.scores is not None or not needs_scores(settings):
        count = bound_count(source, settings, given.scores, work)
        return _Decided(decide(source, settings, given.scores, count), given.scores)
    check_plan_settings(source, settings)
    run = calibration_run(source, settings, work, comparing=compares(source, settings))
    scores = calibrate(run, task_of(settings, source), work.progress).scores
    plan = decide(source, settings, scores, count_within(run, settings, scores, work))
    held_out = run.examples.held_out
    quality = measure_quality(run, plan, work.progress) if held_out else None
    return _Decided(plan, scores, quality, measured=True)


def _write(
    source: Source, out: Path, decided: _Decided, *, force: bool, verifying: bool
) -> Converted:
    check_replaceable(source, out, force=force)
    plan, scores, quality = decided.plan, decided.scores, decided.quality
    with building(out) as partial:
        extras = _extras(source, plan, scores, quality)
        links = fill(source, plan, partial, extras, None if scores is None else scores.fingerprint)
        settings = VerifySettings(dtype=None, trust_remote_code=False)
        report = verify(partial, source, settings) if verifying else None
        proved = report is None or report.ok
        if proved:
            finish_folder(partial, out)
    return Converted(out if proved else partial, plan, scores, quality, report, links)


def _extras(
    source: Source, plan: Plan, scores: Scores | None, quality: Quality | None
) -> dict[str, bytes]:
    """What a checkpoint holds beside the model: the card, and what was measured."""
    extras = {str(CARD_FILE): render_card(source, plan, scores, quality).encode()}
    if scores is not None:
        extras[str(SCORES_FILE)] = to_text(scores.to_json()).encode()
    if quality is not None:
        extras[str(QUALITY_FILE)] = to_text(quality.to_json()).encode()
    return extras | pictures(plan, scores, quality)


def retarget(checkpoint: Path, settings: Settings) -> Converted:
    """Rewrite a checkpoint's plan from the scores it carries; its weights are linked, not touched.

    Args:
        checkpoint: a checkpoint of ours.
        settings: `budget` or `layers`, and `target`.

    Raises:
        CheckpointError: the folder is not a checkpoint of ours.
        PlanError: a budget is asked for and the checkpoint carries no scores.
    """
    restore_replaced(checkpoint)
    source, old = open_checkpoint(checkpoint)
    path = checkpoint / SCORES_FILE
    scores = load_scores(path) if path.is_file() else None
    if scores is None and settings.layers is None:
        raise PlanError(
            "the checkpoint carries no scores to choose layers by",
            where=checkpoint,
            next_step="name the layers with --layers 3,7,11, or convert the source again",
        )
    plan = decide(source, under(settings, old.mask), scores)
    plan = replace(plan, profiles=old.profiles)
    # Quality was measured for the old plan, so it does not go along.
    return _write(source, checkpoint, _Decided(plan, scores), force=True, verifying=False)


def with_profiles(plan: Plan, profiles: Mapping[str, Plan]) -> Plan:
    """A plan that offers others by name.

    Raises:
        PlanError: another plan has another mask; a checkpoint has one.
    """
    for name, profile in profiles.items():
        if profile.mask != plan.mask:
            raise PlanError(
                "a profile has another mask than the plan",
                where=f"--profile {name}",
                expected=plan.mask,
                got=profile.mask,
            )
    layers = {name: profile.full_attention_layers for name, profile in profiles.items()}
    return replace(plan, profiles={**plan.profiles, **layers})


def check_given_plan(source: Source, settings: Settings, plan: Plan) -> Plan:
    """A plan from a file, applied to this source.

    Raises:
        PlanError: it is a plan for a model of another depth or for a longer context, or the target
            does not honour it.
    """
    plan.check_depth(source.shape.layers, "--plan")
    plan.mask.check_fits(source.shape.context_tokens)
    check_target(settings.target, source, plan.mask)
    return replace(plan, source=source.name, revision=source.revision)
