"""`hybridize verify`: does a checkpoint compute its plan?"""

from __future__ import annotations

from pathlib import Path

import click

from converter.cli.options import PATH, Common, common_options


@click.command()
@click.argument("checkpoint", type=PATH)
@click.option("--against", metavar="SOURCE", help="The model it was made from, to compare with.")
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
    """Prove in a fresh process, offline, that CHECKPOINT computes its plan; exit 1 if not."""
    from converter.cli.show import show_report
    from converter.source import open_source
    from converter.verification.verify import VerifySettings
    from converter.verification.verify import verify as check

    source = open_source(against, revision=revision, offline=common.offline) if against else None
    report = check(checkpoint, source, VerifySettings(dtype, trust_remote_code))
    common.console.result(report.to_json(), lambda: show_report(common.console, report))
    failed = [check.name for check in report.checks if not check.ok]
    common.console.say(
        f"FAILED: {', '.join(failed)}" if failed else "ok: the checkpoint computes its plan"
    )
    return 1 if failed else 0
