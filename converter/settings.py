"""Every setting of a conversion in one table, from which options and recipe keys are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from converter.calibration.data.settings import DataSettings
from converter.calibration.selectors import (
    BEST,
    EFFORTS,
    METHODS,
    NORMAL,
    PERIODIC,
    Selector,
    measuring,
    nested,
    periodic_among,
    problem_of,
    selectors_of,
)
from converter.common.errors import PlanError, UsageError, did_you_mean
from converter.common.setting import rows_of, setting
from converter.common.statistics import FEWEST
from converter.engines.support import TARGETS, check_target
from converter.model.dimensions import ModelDimensions
from converter.model.mask import Mask
from converter.plan.budget import Budget, NllBudget, parse_budget
from converter.plan.plan import layer_types_of
from converter.plan.units import GRANULARITIES, KV_HEAD, LAYER, Units, units_of

if TYPE_CHECKING:
    from converter.calibration.calibrate import CalibrationTask
    from converter.calibration.scores import Scores
    from converter.model.source import Source

DEFAULT_BUDGET = "1/4"
_LARGEST_DEFAULT_WINDOW = 2048
_LONGEST_DEFAULT_PROMPT = 16384
_QUICK_PROMPT = 512
_QUICK = {"samples": FEWEST, "validation": FEWEST, "holdout": FEWEST}
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Settings:
    """The settings of a run: every option and recipe key, in one table."""

    source: str | None = setting(None, "Model folder or Hub id (recipes only; else the argument).")
    revision: str | None = setting(None, "Commit, tag or branch of a Hub id.")
    window: int | None = setting(
        None,
        "Tokens a sliding layer sees, the current one included.",
        told="1/16 of the context, at most 2048",
    )
    sinks: int = setting(0, "First tokens that sliding layers always keep.")
    full_decode: bool = setting(False, "Let generated tokens attend to everything.")
    budget: str | None = setting(
        None,
        "Layers that keep full attention: a count, a fraction, as many as a KV cache allows "
        "(kv:2GiB@128k), or as few as a loss allows (nll:0.05).",
        told=DEFAULT_BUDGET,
    )
    granularity: str | None = setting(
        None,
        "What is chosen and counted: whole layers, or the KV heads of layers.",
        choices=GRANULARITIES,
        told="that of the scores, else layer",
    )
    layers: tuple[int, ...] | None = setting(
        None, "The layers that keep full attention, such as 3,7,11."
    )
    method: str = setting(
        BEST,
        "How layers are chosen; of several, with commas, the one that does best on further "
        f"examples. One of {', '.join(METHODS)}.",
        choices=METHODS,
        several=True,
    )
    effort: str = setting(
        NORMAL,
        "What guided search may take: "
        + ", ".join(f"{name} {passes}" for name, passes in EFFORTS.items())
        + " passes of the model over each example.",
        choices=tuple(EFFORTS),
    )
    profiles: bool = setting(False, "Choose for every kind of input by itself, too.")
    offset: int = setting(0, "First full layer of a periodic plan.", least=0)
    exact: bool = setting(
        False, "Score every layer on every example, instead of until the choice is clear."
    )
    data: str = setting(
        "recall",
        "A file of rows (.jsonl, .json, .parquet) or of text (.txt, .md), a data set of the Hub "
        "(hub:OWNER/NAME), `recall` for generated examples, or several: LABEL=DATA,LABEL=DATA.",
    )
    samples: int = setting(64, "Examples to score layers on.", least=1)
    validation: int = setting(
        128, "Further examples, on which choices are held against each other.", least=1
    )
    holdout: int = setting(32, "Further examples, for the quality report.", least=0)
    quick: bool = setting(
        False,
        "A first look: 16 examples of each purpose, and prompts of two windows (512 tokens at "
        "least), where nothing else is said.",
    )
    length: int | None = setting(
        None,
        "Longest prompt in tokens; generated prompts have this length.",
        told="15/16 of the context, at most 16384",
        least=1,
    )
    min_answer: int = setting(1, "Drop answers of fewer tokens.", least=1)
    max_answer: int = setting(512, "Drop answers of more tokens.", least=1)
    seed: int = setting(0, "Seed of the examples and their order.", least=0)
    target: str = setting("any", "Engine that must honour the plan.", choices=TARGETS)
    copy: bool = setting(False, "Copy the weights, instead of linking to those of the source.")
    device: str = setting(
        "auto", "cpu, cuda, cuda:N, mps, or `spread` over all GPUs.", told="a GPU when there is one"
    )
    dtype: str = setting(
        "auto",
        "Of weights and activations.",
        told="bfloat16 on a GPU that has it, float32 on a CPU",
        choices=DTYPES,
    )
    memory: str | None = setting(
        None,
        "Stay within so much of the device's memory, such as 4GB: layer by layer if need be.",
        told="what is free there",
    )

    def mask(self, dimensions: ModelDimensions) -> Mask:
        """What sliding layers of such a model see.

        Raises:
            PlanError: the window is below 1 or as long as the model's context.
        """
        window = self.window
        if window is None:
            window = max(1, min(_LARGEST_DEFAULT_WINDOW, dimensions.context_tokens // 16))
        mask = Mask(window, self.sinks, self.full_decode)
        mask.check_fits(dimensions.context_tokens)
        return mask

    def under(self, mask: Mask, granularity: str | None = None) -> Settings:
        """These settings with another mask, and what was measured under it."""
        return replace(
            self,
            window=mask.window_tokens,
            sinks=mask.sink_tokens,
            full_decode=mask.full_attention_decode,
            granularity=granularity,
        )

    def prompt_tokens(self, dimensions: ModelDimensions) -> int:
        """The longest prompt.

        Raises:
            UsageError: it leaves no room for an answer in the model's context.
        """
        if self.length is None:
            longest = min(_LONGEST_DEFAULT_PROMPT, dimensions.context_tokens * 15 // 16)
            window = self.mask(dimensions).window_tokens
            return min(longest, max(_QUICK_PROMPT, 2 * window)) if self.quick else longest
        if self.length >= dimensions.context_tokens:
            raise UsageError(
                "the prompts would be longer than the model's context",
                where="--length",
                expected=f"below {dimensions.context_tokens}",
                got=self.length,
            )
        return self.length

    def examples(self, dimensions: ModelDimensions, *, comparing: bool) -> DataSettings:
        """Which examples to take; some to compare choices on only where there will be several.

        Raises:
            UsageError: the prompts leave no room for an answer in the model's context.
        """
        return DataSettings(
            data=self.data,
            samples=self.samples,
            validation=self.validation if comparing else 0,
            holdout=self.holdout,
            length_tokens=self.prompt_tokens(dimensions),
            min_answer_tokens=self.min_answer,
            max_answer_tokens=self.max_answer,
            seed=self.seed,
        )

    def parsed_budget(self) -> Budget:
        """How much full attention to keep; raises PlanError where it cannot be read."""
        return parse_budget(DEFAULT_BUDGET if self.budget is None else self.budget)

    def loss_bound(self) -> float | None:
        """Where the budget is a loss: how far above the original's, in nats per answer token."""
        budget = None if self.layers is not None else self.parsed_budget()
        return budget.bound if isinstance(budget, NllBudget) else None

    @property
    def is_periodic(self) -> bool:
        """Whether evenly spaced layers are asked for, which nothing is measured for."""
        return self.layers is None and selectors_of(self.method) == (PERIODIC,)

    def task(self, dimensions: ModelDimensions) -> CalibrationTask:
        """What is to be found out; raises UsageError where the method measures nothing."""
        from converter.calibration.calibrate import CalibrationTask

        methods = measuring(self.selectors)
        if self.loss_bound() is not None:
            # One order has to serve every count: that of the last method that has one.
            methods = nested(methods)[-1:]
        race = len(methods) == 1 and not self.exact
        return CalibrationTask(methods, self.kept(dimensions), race, self.profiles)

    @property
    def selectors(self) -> tuple[Selector, ...]:
        """Those of the methods; raises UsageError where one cannot choose KV heads."""
        if self.by_heads and self.profiles:
            raise UsageError("plans of KV heads are chosen for all inputs", where="--profiles")
        return selectors_of(self.method, self.effort, self.granularity or LAYER)

    @property
    def by_heads(self) -> bool:
        """Whether KV heads are chosen, and not whole layers."""
        return self.granularity == KV_HEAD

    def units(self, dimensions: ModelDimensions) -> Units:
        """What is chosen: layers or KV heads; raises PlanError where heads are layers."""
        return units_of(self.granularity or LAYER, dimensions)

    def compares(self, dimensions: ModelDimensions) -> bool:
        """Whether choices are compared: of several methods, or with the original."""
        bound = self.loss_bound() is not None
        return bound or self.task(dimensions).compares(self.units(dimensions))

    def check_plan(self, source: Source, scores: Scores | None = None) -> None:
        """Refuse scores, a budget, layers, an offset or a target that cannot work, before any work.

        Raises:
            PlanError, UsageError, ScoresError: naming what cannot.
        """
        if self.is_periodic and self.loss_bound() is not None:
            raise PlanError(
                "a loss bound takes layers from the front of a ranking",
                where="--budget",
                got=f"--method {self.method}",
                next_step="choose by a --method that measures, or give a number of layers",
            )
        if scores is not None:
            self.check_scores(source, scores)
            return
        shape = source.shape
        check_target(self.target, source, self.mask(shape), by_heads=self.by_heads)
        if self.layers is not None:
            layer_types_of(self.layers, shape.layers, shape.kinds)
            return
        _ = self.selectors
        count = self.kept(shape)
        if self.is_periodic:
            periodic_among(shape.full_layers, count, self.offset)

    def check_scores(self, source: Source, scores: Scores) -> None:
        """Refuse, by a ScoresError, scores of another model, or of another mask than asked for."""
        scores.check_model(source)
        scores.check_mask(self.window, self.sinks or None, self.full_decode or None)
        scores.check_granularity(self.granularity)

    def kept(self, dimensions: ModelDimensions) -> int:
        """How many units the budget keeps full, all where a loss decides; raises PlanError."""
        budget, units = self.parsed_budget(), self.units(dimensions)
        if isinstance(budget, NllBudget):
            return units.total
        return budget.count(units, dimensions, self.mask(dimensions))


SETTINGS = rows_of(Settings)


def build_settings(
    recipe: Mapping[str, Any],
    overrides: tuple[str, ...],
    options: Mapping[str, Any],
    where: object = "recipe",
) -> Settings:
    """Settings from a recipe, `--set key=value` and command-line options, the later ones winning.

    Args:
        recipe: keys and values as TOML gives them.
        overrides: `key=value` texts.
        options: option values; None where the user gave none.
        where: what to call the recipe in messages.

    Raises:
        UsageError: naming every unknown key and wrong value at once.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    for key, value in recipe.items():
        _take(values, problems, f"{where}: {key}", key, value)
    for text in overrides:
        key, equals, raw = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            problems.append(f"--set {text}: expected key=value")
            continue
        raw = raw.strip()
        value = SETTINGS[key].parsed(raw) if key in SETTINGS else raw
        _take(values, problems, f"--set {key}", key, value)
    for key, value in options.items():
        if value is not None:
            _take(values, problems, SETTINGS[key].flag, key, SETTINGS[key].parsed(value))
    if problem := problem_of(values.get("method", BEST)):
        problems.append(problem)
    if "layers" in values and "budget" in values:
        problems.append("layers and budget: give one of the two")
    if problems:
        raise UsageError(
            "these settings cannot be used" if len(problems) > 1 else "a setting cannot be used",
            got="\n    ".join(["", *problems]) if len(problems) > 1 else problems[0],
            next_step="see hybridize convert --help",
        )
    return Settings(**((_QUICK if values.get("quick") else {}) | values))


def _take(values: dict[str, Any], problems: list[str], where: str, key: str, value: Any) -> None:
    """Add a checked value, or say what is wrong with it."""
    if key not in SETTINGS:
        hint = did_you_mean(key, SETTINGS) or f"known: {', '.join(SETTINGS)}"
        problems.append(f"{where}: there is no such setting; {hint}")
    elif problem := SETTINGS[key].problem_of(value):
        problems.append(f"{where}: {problem}")
    else:
        values[key] = tuple(value) if SETTINGS[key].kind is tuple else value
