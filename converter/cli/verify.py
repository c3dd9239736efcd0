"""`hybridize verify`: does a checkpoint compute its plan?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from converter.cli.options import PATH, Common, common_options
from converter.common.errors import UsageError

if TYPE_CHECKING:
    from converter.checkpoint.verify.report import Report


@click.command()
@click.argument("checkpoint", type=PATH)
@click.option(
    "--against",
    metavar="SOURCE",
    help="The model it was made from, to compare with; for a GGUF, the checkpoint.",
)
@click.option("--revision", metavar="REVISION", help="Of the source, when it is a Hub id.")
@click.option(
    "--dtype",
    # Half precision rounds more than a window wrong by one may show.
    type=click.Choice(("float32", "float64")),
    help="Of weights and activations. [default: float64 for small models, else float32]",
)
@click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run the checkpoint's Python files even when they are not this version's.",
)
@common_options(recipe=False)
def verify(
    common: Common,
    checkpoint: Path,
    against: str | None,
    revision: str | None,
    dtype: str | None,
    trust_remote_code: bool,
) -> int:
    """Prove in a fresh process, offline, that CHECKPOINT computes its plan; exit 1 if not.

    CHECKPOINT is a folder, or a GGUF that `hybridize export` wrote, which is run in llama.cpp.
    """
    from converter.engines.gguf.container import is_gguf

    if is_gguf(checkpoint):
        return _verify_gguf(common, checkpoint, against, revision, dtype, trust_remote_code)
    from converter.checkpoint.verify.checks import verify as check
    from converter.model.source import open_source

    source = open_source(against, revision=revision, offline=common.offline) if against else None
    report = check(checkpoint, source, dtype=dtype, trust_remote_code=trust_remote_code)
    return _tell(common, report, "the checkpoint computes its plan")


def _verify_gguf(
    common: Common,
    file: Path,
    against: str | None,
    revision: str | None,
    dtype: str | None,
    trust_remote_code: bool,
) -> int:
    from converter.engines.gguf.verify import verify_gguf

    given = {"--revision": revision, "--dtype": dtype}
    if also := [name for name, value in given.items() if value is not None]:
        raise UsageError("a GGUF is proved in float32, against a folder", got=", ".join(also))
    if against is None:
        raise UsageError(
            "say which checkpoint the GGUF was made from", where="--against", expected="a folder"
        )
    report = verify_gguf(file, Path(against), trust_remote_code=trust_remote_code)
    return _tell(common, report, "llama.cpp computes the plan from this file")


def _tell(common: Common, report: Report, ok: str) -> int:
    """Print a report; the exit status."""
    from converter.cli.tables import show_report

    common.console.result(report.to_json(), lambda: show_report(common.console, report))
    common.console.say(f"ok: {ok}" if report.ok else f"FAILED: {', '.join(report.failed)}")
    return 0 if report.ok else 1
