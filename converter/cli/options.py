"""Options that commands share, made from the table of settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from converter.cli.console import Console
from converter.cli.grouping import Section, option
from converter.cli.timetable import Timetable
from converter.common.resources import read_recipe, recipe_path
from converter.settings import SETTINGS, Settings, build_settings

if TYPE_CHECKING:
    from converter.calibration.distributed import Processes
    from converter.calibration.run import RunContext
    from converter.calibration.scores import Scores

Command = TypeVar("Command", bound=Callable[..., Any])

MASK = ("window", "sinks", "full_decode")
DATA = ("data", "quick", "samples", "length", "min_answer", "max_answer", "seed")
CHOICE = ("budget", "granularity", "layers", "method", "offset", "target")
PLACEMENT = ("device", "dtype")
# What every command takes that may measure.
MEASURING = (
    *("revision", "budget", "granularity", "target", *MASK, *DATA, *PLACEMENT, "memory"),
    *("method", "effort", "profiles", "validation"),
)

SECTIONS = {
    Section.SOURCE: ("revision",),
    Section.KEEP: ("budget", "granularity", "layers", *MASK, "target"),
    Section.CHOOSING: ("method", "effort", "offset", "profiles", "exact"),
    Section.DATA: (*DATA, "validation", "holdout"),
    Section.MACHINE: (*PLACEMENT, "memory"),
    Section.OUTPUT: ("copy",),
}
_SECTION_OF = {name: section for section, names in SECTIONS.items() for name in names}
_METAVARS = {
    "revision": "REVISION",
    "budget": "BUDGET",
    "layers": "I,J,...",
    "data": "DATA",
    "device": "DEVICE",
    "memory": "SIZE",
    "method": "NAME[,...]",
}


@dataclass(frozen=True)
class Common:
    """What every command takes.

    Attributes:
        console: where its words go.
        offline: never ask the network.
        recipe: recipe file or name.
        overrides: `--set` texts.
    """

    console: Console
    offline: bool
    recipe: str | None
    overrides: tuple[str, ...]

    def settings(self, options: dict[str, Any]) -> Settings:
        """The settings of this run: recipe, then `--set`, then options.

        Raises:
            UsageError: naming every unknown key and wrong value.
        """
        path = recipe_path(self.recipe) if self.recipe else None
        values = read_recipe(path) if path else {}
        return build_settings(values, self.overrides, options, path.name if path else "recipe")

    def run_context(
        self, out: Path, work: Path | None, fresh: bool, processes: Processes | None = None
    ) -> RunContext:
        """How a measurement keeps and shows its progress.

        Args:
            out: the result, beside which progress is kept.
            work: where it is kept instead.
            fresh: forget what an earlier run left there.
            processes: those that share the work; only the one that leads talks.
        """
        from converter.calibration.distributed import ALONE
        from converter.calibration.run import RunContext
        from converter.cli.tables import say_counts

        processes = processes or ALONE
        console = self.console if processes.leads else replace(self.console, verbosity=-1)
        timetable = Timetable(console)
        return RunContext(
            folder=work or out.parent / f"{out.name}.work",
            fresh=fresh,
            progress=timetable.progress,
            announce=lambda examples: say_counts(console, examples),
            say=console.say,
            processes=processes,
            offline=self.offline,
            schedule=timetable.announce,
        )


def settings_options(*names: str) -> Callable[[Command], Command]:
    """Options for the named settings; their values reach the command by the settings' names."""

    def decorate(command: Command) -> Command:
        # As the table of sections has them, whatever order a command names them in.
        for name in sorted(names, key=[*_SECTION_OF].index, reverse=True):
            setting = SETTINGS[name]
            kind: Any = str if setting.kind is tuple else setting.kind
            if setting.choices and not setting.several:
                kind = click.Choice(setting.choices, case_sensitive=False)
            # A value for options that are no flags would let click take them without one.
            flag: dict[str, Any] = {"is_flag": True, "flag_value": True}
            value = "N" if kind is int else _METAVARS.get(name, "")
            command = option(
                _SECTION_OF[name],
                f"{setting.flag} {name} {value}",
                setting.help,
                default=None,
                **(flag if setting.kind is bool else {"type": kind}),
            )(command)
        return command

    return decorate


def common_options(*, recipe: bool) -> Callable[[Command], Command]:
    """Output, network and, where the command has settings, recipe options."""

    def decorate(command: Command) -> Command:
        import functools

        @functools.wraps(command)
        def wrapped(
            *args: Any,
            json_output: bool,
            quiet: bool,
            verbose: bool,
            offline: bool,
            recipe: str | None = None,
            overrides: tuple[str, ...] = (),
            **kwargs: Any,
        ) -> Any:
            console = Console(json_output, -1 if quiet else int(verbose))
            console.start_logging()
            return command(Common(console, offline, recipe, overrides), *args, **kwargs)

        options = [
            option(Section.OUTPUT, "--json json_output", "Print one JSON object."),
            option(Section.OUTPUT, "-q --quiet", "No talk, no progress."),
            option(Section.OUTPUT, "-v --verbose", "More talk."),
            option(Section.MACHINE, "--offline", "Never ask the network."),
        ]
        if recipe:
            options += [
                option(Section.SOURCE, "--recipe NAME|FILE", "Take settings from a recipe."),
                option(
                    Section.SOURCE,
                    "--set overrides KEY=VALUE",
                    "Change one setting of the recipe.",
                    multiple=True,
                ),
            ]
        result: Any = wrapped
        for add in reversed(options):
            result = add(result)
        decorated: Command = result
        return decorated

    return decorate


PATH = click.Path(path_type=Path)
# A folder or a Hub id: shells complete the former.
MODEL = click.Path(path_type=str)

force_option = option(Section.OUTPUT, "--force", "Replace an existing output.")
out_option = option(Section.OUTPUT, "--out FILE", "Write the result to a file.", type=PATH)
scores_option = option(
    Section.SOURCE, "--scores scores_file FILE", "Decide from these scores.", type=PATH
)
trust_option = option(
    Section.SOURCE,
    "--trust-remote-code",
    "Run the checkpoint's own Python files instead of this version's.",
)


def given_scores(file: Path | None, settings: Settings, method: str | None) -> Scores | None:
    """Scores of a file, of the methods asked for, if any are; evenly spaced layers need none.

    Raises:
        ScoresError: the file is not scores, or they are of other methods.
    """
    from converter.calibration.scores_file import load_scores
    from converter.calibration.selectors import PERIODIC, labels_of

    scores = None if file is None else load_scores(file)
    if scores is not None and method not in (None, PERIODIC.name):
        scores.check_methods(labels_of(settings.method, scores.granularity))
    return scores


def work_options(command: Command) -> Command:
    """Where a measurement keeps what it has done."""
    fresh = option(Section.OUTPUT, "--fresh", "Forget what an earlier run measured.")
    work = option(
        Section.OUTPUT,
        "--work DIR",
        "Keep progress here, to resume. [default: beside the output]",
        type=PATH,
    )
    decorated: Command = work(fresh(command))
    return decorated
