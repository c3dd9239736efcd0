"""`hybridize verify`: does a checkpoint compute its plan?"""

from __future__ import annotations

from pathlib import Path

import click

from converter.cli.grouping import Section, command, option
from converter.cli.options import PATH, Common, common_options, settings_options, trust_option
from converter.common.errors import UsageError


@command()
@click.argument("checkpoint", type=PATH)
@option(
    Section.SOURCE,
    "--against SOURCE",
    "The model it was made from, to compare with; for a GGUF, the checkpoint.",
)
@option(
    Section.MACHINE,
    "--dtype",
    "Of weights and activations. [default: float64 for small models, else float32]",
    # Half precision rounds more than a window wrong by one may show.
    type=click.Choice(("float32", "float64")),
)
@settings_options("revision", "device")
@trust_option
@common_options(recipe=False)
def verify(
    common: Common,
    checkpoint: Path,
    against: str | None,
    revision: str | None,
    dtype: str | None,
    device: str | None,
    trust_remote_code: bool,
) -> int:
    """Prove that CHECKPOINT computes its plan; exit 1 if not.

    The proof runs in a fresh process, offline. CHECKPOINT is a folder, or a GGUF that `hybridize
    export` wrote, which is run in llama.cpp.
    """
    from converter.cli.tables import show_report
    from converter.engines.gguf.container import is_gguf

    if is_gguf(checkpoint):
        from converter.engines.gguf.verify import verify_gguf

        given = {"--revision": revision, "--dtype": dtype, "--device": device}
        if also := [name for name, value in given.items() if value is not None]:
            raise UsageError(
                "a GGUF is proved on the CPU in float32, against a folder", got=", ".join(also)
            )
        if against is None:
            what = "say which checkpoint the GGUF was made from"
            raise UsageError(what, where="--against", expected="a folder")
        report = verify_gguf(
            checkpoint, Path(against), trust_remote_code=trust_remote_code, warn=common.console.say
        )
        ok = "llama.cpp computes the plan from this file"
    else:
        from converter.checkpoint.verify.checks import verify as check
        from converter.model.source import open_source

        offline = common.offline
        source = open_source(against, revision=revision, offline=offline) if against else None
        report = check(
            checkpoint,
            source,
            device=device or "auto",
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            say=common.console.say,
        )
        ok = "the checkpoint computes its plan"

    def show() -> None:
        show_report(common.console, report)
        count = len(report.checks)
        said = f"ok: {ok} ({count} checks)" if report.ok else f"FAILED: {', '.join(report.failed)}"
        common.console.print(said)

    common.console.result(report.to_json(), show)
    return 0 if report.ok else 1
