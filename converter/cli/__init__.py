"""The command line: the one place that turns errors into messages and exit statuses.

Exit: 0 done, 1 a check failed, 2 bad input or usage, 130 interrupted (run it again to resume).
"""

from __future__ import annotations

import io
import os
import re
import sys

import click

from converter import __version__
from converter.cli.calibrate import calibrate
from converter.cli.convert import convert, retarget
from converter.cli.evaluate import evaluate
from converter.cli.export import export
from converter.cli.grouping import OrderedGroup
from converter.cli.inspect import inspect
from converter.cli.plan import plan
from converter.cli.push import push
from converter.cli.recipes import recipes
from converter.cli.run import run as run_command
from converter.cli.verify import verify
from converter.common.errors import HybridizeError, UsageError, says_memory_is_full
from converter.common.units import human_bytes

COMMANDS = (
    inspect,
    calibrate,
    plan,
    convert,
    verify,
    evaluate,
    retarget,
    export,
    run_command,
    push,
    recipes,
)

_INTERRUPTED = 130
# Options that make a command take less memory, where it has them.
_LESS_MEMORY = {
    "memory": "--memory, so that layers are read in turn",
    "length": "a smaller --length",
    "lengths": "smaller --lengths",
    "text_tokens": "fewer --text-tokens",
    "batch": "a smaller --batch",
    "context": "a smaller --context",
    "dtype": "--dtype bfloat16",
    "device": "another --device",
}


@click.group(
    cls=OrderedGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A strip of layers must not fail a run on a terminal that lacks its letters.
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command; its exit status."""
    try:
        result = hybridize.main(arguments, prog_name="hybridize", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return 2
    except HybridizeError as error:
        click.echo(f"error: {error}", err=True)
        return 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted: run the same command again to resume", err=True)
        return _INTERRUPTED
    except (BrokenPipeError, SystemExit):
        # The reader of our output went away (`hybridize plan ... | head`), which click turns into
        # an exit; nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where, reason = error.filename, error.strerror or error
        refusal = HybridizeError("the operating system refuses", where=where, got=reason)
        click.echo(f"error: {refusal}", err=True)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or says_memory_is_full(error)):
            raise
        click.echo(f"error: {_too_little_memory(error, arguments)}", err=True)
        return 2
    return result if isinstance(result, int) else 0


def _too_little_memory(error: BaseException, arguments: list[str]) -> UsageError:
    """A full memory, with what of the command's options would take less of it."""
    said = " ".join(str(error).split())
    asked = re.search(r"tried to allocate ([\d.]+) ?(\w+)", said, re.IGNORECASE)
    if asked:
        number, unit = asked.groups()
        more = human_bytes(int(number)) if unit == "bytes" else f"{number} {unit}"
        said = f"{more} more were asked for at once"
    command = hybridize.commands.get(arguments[0])
    options = {option.name for option in command.params} if command else set()
    ways = [way for name, way in _LESS_MEMORY.items() if name in options]
    on_gpu = any(name in str(error).lower() for name in ("cuda", "cublas", "mps"))
    return UsageError(
        "there is too little memory",
        where="the GPU" if on_gpu else None,
        got=said or None,
        next_step=f"close other programs, or try {', '.join(ways)}" if ways else None,
    )
