"""What settings and scores decide: the plan, or why there can be none."""

from __future__ import annotations

from dataclasses import replace

from converter.calibration.scores import Scores
from converter.calibration.selectors import PERIODIC, periodic_among, selectors_of
from converter.common.errors import PlanError
from converter.engines.support import check_target
from converter.model.source import Source
from converter.plan.plan import Plan, layer_types_of
from converter.settings import Settings


def check_plan_settings(source: Source, settings: Settings, scores: Scores | None = None) -> None:
    """Refuse scores, a budget, a layer, an offset or a target that cannot work, before any work.

    Raises:
        PlanError: the settings cannot be met.
        ScoresError: the scores belong to another model or mask.
    """
    periodic = settings.layers is None and is_periodic(settings)
    if periodic and settings.loss_bound() is not None:
        raise PlanError(
            "a loss bound takes layers from the front of a ranking",
            where="--budget",
            got=f"--method {settings.method}",
            next_step="choose by a --method that measures, or give a number of layers",
        )
    if scores is not None:
        check_scores(source, settings, scores)
        return
    mask, shape = settings.mask(source.shape), source.shape
    check_target(settings.target, source, mask)
    if settings.layers is not None:
        layer_types_of(settings.layers, shape.layers, shape.kinds)
        return
    count = settings.full_layers(shape)
    if periodic:
        periodic_among(shape.full_layers, count, settings.offset)


def is_periodic(settings: Settings) -> bool:
    """Whether evenly spaced layers are asked for, which nothing is measured for."""
    return selectors_of(settings.method) == (PERIODIC,)


def check_scores(source: Source, settings: Settings, scores: Scores) -> None:
    """Refuse scores of another model, or of another mask than the one asked for."""
    scores.check_model(source)
    scores.check_mask(settings.window, settings.sinks or None, settings.full_decode or None)


def decide(
    source: Source, settings: Settings, scores: Scores | None, count: int | None = None
) -> Plan:
    """The plan that settings and scores say; `count` is told where the budget is a loss."""
    if scores is not None:
        check_scores(source, settings, scores)
    mask = settings.mask(source.shape) if scores is None else scores.mask
    ranking = None if scores is None else scores.order
    profiles: dict[str, tuple[int, ...]] = {}
    if settings.layers is not None:
        full, method, budget = settings.layers, "layers", None
    else:
        wanted, periodic = settings.parsed_budget(), is_periodic(settings)
        if not periodic and scores is None:
            raise PlanError(
                "a plan by score needs scores",
                where="--scores",
                next_step="measure them with: hybridize calibrate SOURCE --out scores.json, "
                "or choose --method periodic or --layers",
            )
        count, budget = wanted.layers(source.shape, mask) if count is None else count, str(wanted)
        if periodic:
            full = periodic_among(source.shape.full_layers, count, settings.offset)
            method = f"{PERIODIC.name}, offset {settings.offset}"
        elif scores is not None:
            full, method = scores.order[:count], scores.chosen_by(count)
            profiles = {kind: tuple(sorted(o[:count])) for kind, o in scores.profiles.items()}
    check_target(settings.target, source, mask)
    types = layer_types_of(full, source.shape.layers, source.shape.kinds)
    return Plan(types, mask, method, budget, ranking, source.name, source.revision, profiles)


def applied(source: Source, settings: Settings, given: Plan) -> Plan:
    """A plan from a file, for this source."""
    given.check_layers(source.shape, "--plan")
    given.mask.check_fits(source.shape.context_tokens)
    check_target(settings.target, source, given.mask)
    return replace(given, source=source.name, revision=source.revision)
