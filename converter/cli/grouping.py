"""Commands whose help lists options by what they are about, and commands in the order of use."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any

import click


class Section(StrEnum):
    """What an option is about; help lists them in this order."""

    SOURCE = "Source"
    KEEP = "What to keep"
    CHOOSING = "Choosing"
    DATA = "Data"
    ASKED = "What to ask"
    SAMPLING = "Sampling"
    MACHINE = "Machine"
    OUTPUT = "Output"


# Columns of the longest option that has its explanation beside it.
_LONGEST = 28


class SectionOption(click.Option):
    """An option that stands in a section of its command's help."""

    def __init__(self, *args: Any, section: Section, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class SectionCommand(click.Command):
    """A command whose help has a section for every kind of option."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options section by section, their explanations below each other."""
        records: dict[Section, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                # Help itself is click's own option.
                section = getattr(parameter, "section", Section.OUTPUT)
                records.setdefault(section, []).append(record)
        widths = [len(flags) for rows in records.values() for flags, _ in rows]
        width = max([width for width in widths if width <= _LONGEST], default=0)
        for section in Section:
            if section in records:
                rows = [(flags.ljust(width), text) for flags, text in records[section]]
                with formatter.section(section):
                    formatter.write_dl(rows, col_max=width)


class OrderedGroup(click.Group):
    """Commands in the order in which they were added."""

    command_class = SectionCommand

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Names in the order of use rather than of the alphabet."""
        return [*self.commands]


def command(name: str | None = None) -> Callable[[Callable[..., Any]], SectionCommand]:
    """A command of ours, as `click.command` makes one."""
    return click.command(name, cls=SectionCommand)


def option(section: Section, spelled: str, text: str, **settings: Any) -> Callable[[Any], Any]:
    """An option of ours, as `click.option` makes one, in a section of help.

    It is spelled as help shows it: its flags, and what stands for its value; without one, and
    without a type, it takes none. A word in small letters is the name of its parameter.
    """
    words = spelled.split()
    value = next((word for word in words if word[0] != "-" and not word.islower()), None)
    kind = {"is_flag": True} if value is None and "type" not in settings else {"metavar": value}
    names = [word for word in words if word != value]
    return click.option(*names, cls=SectionOption, section=section, help=text, **(kind | settings))
