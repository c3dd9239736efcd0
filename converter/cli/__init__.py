"""The command line: the one place that turns errors into messages and exit statuses.

Exit: 0 done, 1 a check failed, 2 bad input or usage, 130 interrupted (run it again to resume).
"""

from __future__ import annotations

import os
import sys

import click

from converter import __version__
from converter.cli.calibrate import calibrate
from converter.cli.convert import convert, retarget
from converter.cli.inspect import inspect
from converter.cli.plan import plan
from converter.cli.recipes import recipes
from converter.cli.verify import verify
from converter.errors import HybridizeError

COMMANDS = (inspect, calibrate, plan, convert, verify, retarget, recipes)

_INTERRUPTED = 130


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    no_args_is_help=False,
)
@click.version_option(__version__, prog_name="hybridize")
def hybridize() -> None:
    """Turn a full-attention language model into a hybrid one, without training.

    It measures which layers need full attention, gives the others sliding-window attention, and
    writes a checkpoint that loads like any other.
    """


for _command in COMMANDS:
    hybridize.add_command(_command)


def main() -> None:
    """Run the command line and exit."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command; its exit status."""
    try:
        result = hybridize.main(arguments, prog_name="hybridize", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return 2
    except HybridizeError as error:
        click.echo(f"error: {error}", err=True)
        return 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted: run the same command again to resume", err=True)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (`hybridize plan ... | head`); nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return result if isinstance(result, int) else 0
