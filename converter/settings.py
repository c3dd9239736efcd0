"""Every setting of a conversion in one table, from which options and recipe keys are made."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

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
    problem_of,
    selectors_of,
)
from converter.common.errors import UsageError
from converter.common.statistics import FEWEST
from converter.engines.support import TARGETS
from converter.model.dimensions import ModelDimensions
from converter.model.mask import Mask
from converter.plan.budget import Budget, NllBudget, parse_budget
from converter.plan.units import GRANULARITIES, KV_HEAD, LAYER, Units, units_of

if TYPE_CHECKING:
    from converter.calibration.calibrate import CalibrationTask

DEFAULT_BUDGET = "1/4"
_LARGEST_DEFAULT_WINDOW = 2048
_LONGEST_DEFAULT_PROMPT = 16384
_QUICK_PROMPT = 512
_QUICK = {"samples": FEWEST, "validation": FEWEST, "holdout": FEWEST}
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def _setting(
    default: Any,
    help_text: str,
    *,
    told: str | None = None,
    choices: tuple[str, ...] = (),
    several: bool = False,
    least: int | None = None,
) -> Any:
    """A field of `Settings` with its row of `SETTINGS`.

    Args:
        default: its value where the user gives none; None is decided from the model.
        help_text: one line for `--help`.
        told: what help says of the default, where that is not its value.
        choices: the values a string may have.
        several: whether a string may name several of them, with commas.
        least: the smallest value an integer may have.
    """
    told = told or (None if default is None or default is False else str(default))
    described = help_text if told is None else f"{help_text} [default: {told}]"
    row = {"help": described, "choices": choices, "several": several, "least": least}
    return field(default=default, metadata=row)


@dataclass(frozen=True)
class Settings:
    """The settings of a run: every option and recipe key, in one table."""

    source: str | None = _setting(None, "Model folder or Hub id (recipes only; else the argument).")
    revision: str | None = _setting(None, "Commit, tag or branch of a Hub id.")
    window: int | None = _setting(
        None,
        "Tokens a sliding layer sees, the current one included.",
        told="1/16 of the context, at most 2048",
    )
    sinks: int = _setting(0, "First tokens that sliding layers always keep.")
    full_decode: bool = _setting(False, "Let generated tokens attend to everything.")
    budget: str | None = _setting(
        None,
        "Layers that keep full attention: a count, a fraction, as many as a KV cache allows "
        "(kv:2GiB@128k), or as few as a loss allows (nll:0.05).",
        told=DEFAULT_BUDGET,
    )
    granularity: str | None = _setting(
        None,
        "What is chosen and counted: whole layers, or the KV heads of layers.",
        choices=GRANULARITIES,
        told="that of the scores, else layer",
    )
    layers: tuple[int, ...] | None = _setting(
        None, "The layers that keep full attention, such as 3,7,11."
    )
    method: str = _setting(
        BEST,
        "How layers are chosen; of several, with commas, the one that does best on further "
        f"examples. One of {', '.join(METHODS)}.",
        choices=METHODS,
        several=True,
    )
    effort: str = _setting(
        NORMAL,
        "What guided search may take: "
        + ", ".join(f"{name} {passes}" for name, passes in EFFORTS.items())
        + " passes of the model over each example.",
        choices=tuple(EFFORTS),
    )
    profiles: bool = _setting(False, "Choose for every kind of input by itself, too.")
    offset: int = _setting(0, "First full layer of a periodic plan.", least=0)
    exact: bool = _setting(
        False, "Score every layer on every example, instead of until the choice is clear."
    )
    data: str = _setting(
        "recall",
        "A file of rows (.jsonl, .json, .parquet) or of text (.txt, .md), a data set of the Hub "
        "(hub:OWNER/NAME), `recall` for generated examples, or several: LABEL=DATA,LABEL=DATA.",
    )
    samples: int = _setting(64, "Examples to score layers on.", least=1)
    validation: int = _setting(
        128, "Further examples, on which choices are held against each other.", least=1
    )
    holdout: int = _setting(32, "Further examples, for the quality report.", least=0)
    quick: bool = _setting(
        False,
        "A first look: 16 examples of each purpose, and prompts of two windows (512 tokens at "
        "least), where nothing else is said.",
    )
    length: int | None = _setting(
        None,
        "Longest prompt in tokens; generated prompts have this length.",
        told="15/16 of the context, at most 16384",
        least=1,
    )
    min_answer: int = _setting(1, "Drop answers of fewer tokens.", least=1)
    max_answer: int = _setting(512, "Drop answers of more tokens.", least=1)
    seed: int = _setting(0, "Seed of the examples and their order.", least=0)
    target: str = _setting("any", "Engine that must honour the plan.", choices=TARGETS)
    copy: bool = _setting(False, "Copy the weights, instead of linking to those of the source.")
    device: str = _setting(
        "auto", "cpu, cuda, cuda:N, mps, or `spread` over all GPUs.", told="a GPU when there is one"
    )
    dtype: str = _setting(
        "auto",
        "Of weights and activations.",
        told="bfloat16 on a GPU that has it, float32 on a CPU",
        choices=DTYPES,
    )
    memory: str | None = _setting(
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

    def kept(self, dimensions: ModelDimensions) -> int:
        """How many units the budget keeps full, all where a loss decides; raises PlanError."""
        budget, units = self.parsed_budget(), self.units(dimensions)
        if isinstance(budget, NllBudget):
            return units.total
        return budget.count(units, dimensions, self.mask(dimensions))


@dataclass(frozen=True)
class Setting:
    """One setting, as commands and recipes spell it.

    Attributes:
        name: its recipe key; the option is this with dashes.
        kind: `int`, `bool`, `str`, or `tuple` for layer indices.
        help, choices, several, least: see `_setting`.
    """

    name: str
    kind: type
    help: str
    choices: tuple[str, ...]
    several: bool
    least: int | None

    @property
    def flag(self) -> str:
        """The command-line option."""
        return "--" + self.name.replace("_", "-")


def _kind(hint: Any) -> type:
    """`int` of `int | None`, and `tuple` of `tuple[int, ...] | None`."""
    parts = [part for part in get_args(hint) if part is not type(None)] or [hint]
    kind: type = get_origin(parts[0]) or parts[0]
    return kind


SETTINGS: dict[str, Setting] = {
    row.name: Setting(row.name, _kind(hint), **row.metadata)
    for row, hint in zip(fields(Settings), get_type_hints(Settings).values(), strict=True)
}


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
        setting = SETTINGS.get(key)
        _take(values, problems, f"--set {key}", key, _parse(setting, raw.strip()))
    for key, value in options.items():
        if value is not None:
            flag = SETTINGS[key].flag
            _take(values, problems, flag, key, _parse(SETTINGS[key], value))
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


def _parse(setting: Setting | None, value: Any) -> Any:
    """Turn the text of an option into the setting's kind; what does not fit stays text."""
    if setting is None or not isinstance(value, str):
        return value
    if setting.kind is bool and value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        if setting.kind is int:
            return int(value)
        if setting.kind is tuple:
            return [] if value in ("", "none") else [int(part) for part in value.split(",")]
    except ValueError:
        pass
    return value


def _take(values: dict[str, Any], problems: list[str], where: str, key: str, value: Any) -> None:
    """Add a checked value, or say what is wrong with it."""
    setting = SETTINGS.get(key)
    if setting is None:
        nearest = difflib.get_close_matches(key, SETTINGS, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else f"; known: {', '.join(SETTINGS)}"
        problems.append(f"{where}: there is no such setting{hint}")
        return
    if setting.kind is tuple:
        if isinstance(value, list) and all(type(item) is int for item in value):
            values[key] = tuple(value)
        else:
            problems.append(f"{where}: expected layer numbers such as 3,7,11, got {value!r}")
        return
    if type(value) is not setting.kind:
        problems.append(f"{where}: expected {_KIND_NAMES[setting.kind]}, got {value!r}")
    elif isinstance(value, str) and setting.choices and (wrong := _unknown(setting, value)):
        nearest = difflib.get_close_matches(wrong, setting.choices, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        problems.append(
            f"{where}: expected one of {', '.join(setting.choices)}, got {wrong!r}{hint}"
        )
    elif isinstance(value, int) and setting.least is not None and value < setting.least:
        problems.append(f"{where}: expected at least {setting.least}, got {value}")
    else:
        values[key] = value


def _unknown(setting: Setting, value: str) -> str:
    """The first part of a value that is no choice of the setting's, empty when there is none."""
    parts = value.split(",") if setting.several else [value]
    return next((part or "nothing" for part in parts if part not in setting.choices), "")


_KIND_NAMES = {int: "a whole number", bool: "true or false", str: "text"}
