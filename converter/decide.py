"""From settings and scores to a mask and a plan."""

from __future__ import annotations

from converter.calibration.results import plan_name
from converter.calibration.scores import Scores
from converter.calibration.selectors import MEASURING, PERIODIC, methods_of, periodic_layers
from converter.common.errors import PlanError, ScoresError, UsageError
from converter.engines.support import check_target
from converter.model.dimensions import ModelDimensions
from converter.model.mask import Mask
from converter.model.source import Source
from converter.plan.budget import Budget, NllBudget, parse_budget
from converter.plan.plan import Plan, layer_types_of
from converter.settings import Settings

DEFAULT_BUDGET = "1/4"
_LARGEST_DEFAULT_WINDOW = 2048
_LONGEST_DEFAULT_PROMPT = 16384


def choose_mask(settings: Settings, shape: ModelDimensions) -> Mask:
    """The mask that the settings ask for.

    Raises:
        PlanError: the window is below 1 or as long as the model's context.
    """
    window = settings.window
    if window is None:
        window = max(1, min(_LARGEST_DEFAULT_WINDOW, shape.context_tokens // 16))
    mask = Mask(window, settings.sinks, settings.full_decode)
    mask.check_fits(shape.context_tokens)
    return mask


def choose_length(settings: Settings, shape: ModelDimensions) -> int:
    """The longest prompt, in tokens.

    Raises:
        UsageError: it leaves no room for an answer in the model's context.
    """
    if settings.length is None:
        return min(_LONGEST_DEFAULT_PROMPT, shape.context_tokens * 15 // 16)
    if settings.length >= shape.context_tokens:
        raise UsageError(
            "the prompts would be longer than the model's context",
            where="--length",
            expected=f"below {shape.context_tokens}",
            got=settings.length,
        )
    return settings.length


def chosen_budget(settings: Settings) -> Budget:
    """The budget that the settings ask for.

    Raises:
        PlanError: it cannot be read.
    """
    return parse_budget(DEFAULT_BUDGET if settings.budget is None else settings.budget)


def needs_scores(settings: Settings) -> bool:
    """Whether the plan depends on a measurement."""
    return settings.layers is None and measures(settings.method)


def check_plan_settings(source: Source, settings: Settings) -> None:
    """Refuse a budget, layer, offset or target that cannot work, before anything is measured.

    Raises:
        PlanError: saying which.
    """
    mask = choose_mask(settings, source.shape)
    check_target(settings.target, source, mask)
    total = source.shape.layers
    if settings.layers is not None:
        layer_types_of(settings.layers, total)
        return
    budget = chosen_budget(settings)
    if isinstance(budget, NllBudget):
        if not measures(settings.method):
            raise PlanError(
                "a loss bound takes layers from the front of a ranking",
                where="--budget",
                got=f"--method {settings.method}",
                next_step="choose by a --method that measures, or give a number of layers",
            )
        return
    count = budget.layers(source.shape, mask)
    if not measures(settings.method):
        periodic_layers(total, count, settings.offset)


def decide(
    source: Source, settings: Settings, scores: Scores | None, count: int | None = None
) -> Plan:
    """Choose the layers that keep full attention.

    Args:
        source: the model.
        settings: `layers`, or `budget` with `method`.
        scores: the measurement; None when nothing has to be measured.
        count: how many layers keep full attention, where the budget is a loss and a measurement
            has told.

    Raises:
        PlanError: the settings cannot be met.
        ScoresError: the scores belong to another model or mask.
    """
    total = source.shape.layers
    profiles: dict[str, tuple[int, ...]] = {}
    if scores is not None:
        check_scores(source, settings, scores)
        mask, ranking = scores.mask, scores.order
    else:
        mask, ranking = choose_mask(settings, source.shape), None
    if settings.layers is not None:
        full, method, budget = settings.layers, "layers", None
    else:
        wanted = chosen_budget(settings)
        if count is None:
            count = wanted.layers(source.shape, mask)
        budget = str(wanted)
        if not measures(settings.method):
            full = periodic_layers(total, count, settings.offset)
            method = plan_name(PERIODIC.name, settings.offset)
        elif scores is None or ranking is None:
            raise scores_needed()
        else:
            full, method = ranking[:count], scores.chosen_by(count)
            profiles = {kind: tuple(sorted(o[:count])) for kind, o in scores.profiles.items()}
    check_target(settings.target, source, mask)
    return Plan(
        layer_types=layer_types_of(full, total),
        mask=mask,
        method=method,
        budget=budget,
        ranking=ranking,
        source=source.name,
        revision=source.revision,
        profiles=profiles,
    )


def scores_needed() -> PlanError:
    """The refusal of a plan by score without scores."""
    return PlanError(
        "a plan by score needs scores",
        where="--scores",
        next_step="measure them with: hybridize calibrate SOURCE --out scores.json, "
        "or choose --method periodic or --layers",
    )


def measures(method: str) -> bool:
    """Whether a `--method` runs the model; else its layers are evenly spaced."""
    return not set(methods_of(method)).isdisjoint(MEASURING)


def check_method(scores: Scores, method: str | None) -> None:
    """Refuse scores of another method than the one asked for, if one was.

    Raises:
        ScoresError: the scores were measured by another method.
    """
    measured = tuple(scores.fingerprint.get("methods", (scores.method,)))
    if method is not None and measures(method) and methods_of(method) != measured:
        raise ScoresError(
            "the scores were measured by another method",
            where="--method",
            expected=",".join(measured),
            got=method,
            next_step="leave the option out, or calibrate by the new method",
        )


def check_scores(source: Source, settings: Settings, scores: Scores) -> None:
    """Refuse scores of another model, or of another mask than the one asked for.

    Raises:
        ScoresError: saying what differs.
    """
    if scores.fingerprint.get("source") != source.fingerprint:
        raise ScoresError(
            "the scores were measured on another model",
            where="--scores",
            expected=f"fingerprint {source.fingerprint[:16]}...",
            got=f"{str(scores.fingerprint.get('source'))[:16]}...",
            next_step="measure this one with: hybridize calibrate SOURCE --out scores.json",
        )
    if len(scores.layers) != source.shape.layers:
        raise ScoresError(
            "the scores are for a model of another depth",
            where="--scores",
            expected=f"{source.shape.layers} layers",
            got=len(scores.layers),
        )
    asked = (
        ("window_tokens", settings.window, "--window"),
        ("sink_tokens", settings.sinks or None, "--sinks"),
        ("full_attention_decode", settings.full_decode or None, "--full-decode"),
    )
    for field, value, option in asked:
        measured = getattr(scores.mask, field)
        if value is not None and value != measured:
            raise ScoresError(
                "the scores were measured under another mask",
                where=option,
                expected=measured,
                got=value,
                next_step="leave the option out, or calibrate under the new mask",
            )
