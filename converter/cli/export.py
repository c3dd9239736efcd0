"""`hybridize export`: a checkpoint, or a stock GGUF and a plan, as GGUF."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path

import click

from converter.cli.grouping import Section, command, option
from converter.cli.options import PATH, Common, common_options, force_option
from converter.common.errors import UsageError
from converter.engines.gguf import TYPES


@command()
@click.argument("checkpoint", type=PATH)
@click.argument("file", type=PATH, required=False)
@option(
    Section.OUTPUT,
    "--outtype --type kind TYPE",
    f"Of the matrices: {', '.join(TYPES)}. [default: the checkpoint's own precision]",
    type=click.Choice(TYPES, case_sensitive=False),
)
@option(
    Section.SOURCE,
    "--from-gguf stock_file STOCK.gguf",
    "Give this GGUF a plan instead of converting a checkpoint; its tensors are not touched.",
    type=PATH,
)
@option(Section.SOURCE, "--plan plan_file FILE", "The plan for --from-gguf.", type=PATH)
@option(
    Section.OUTPUT,
    "--stock-arch",
    "Keep the model's own architecture, under which today's llama.cpp ignores the plan.",
)
@force_option
@common_options(recipe=False)
def export(
    common: Common,
    checkpoint: Path,
    file: Path | None,
    kind: str | None,
    stock_file: Path | None,
    plan_file: Path | None,
    stock_arch: bool,
    force: bool,
) -> None:
    """Write CHECKPOINT to FILE, a GGUF that llama.cpp honours.

    Unmodified llama.cpp computes the plan from it. With --from-gguf and --plan, FILE stands alone.
    """
    from converter.common.units import human_bytes
    from converter.engines.gguf.export import export as convert
    from converter.engines.gguf.export import retrofit
    from converter.plan.plan import load_plan

    if stock_file is not None:
        if file is not None:
            raise UsageError("--from-gguf takes the place of the checkpoint", got=checkpoint)
        if plan_file is None:
            expected = "OUT/hybrid/plan.json"
            raise UsageError("--from-gguf needs a plan", where="--plan", expected=expected)
        if kind is not None:
            raise UsageError("--from-gguf keeps the types of the tensors", got=f"--type {kind}")
        plan = load_plan(plan_file)
        done = retrofit(stock_file, plan, checkpoint, stock_arch=stock_arch, force=force)
    else:
        if file is None:
            raise UsageError("say what to export and where to", expected="CHECKPOINT FILE.gguf")
        if plan_file is not None:
            raise UsageError("--plan goes with --from-gguf: a checkpoint has its plan")
        done = convert(checkpoint, file, kind, stock_arch=stock_arch, force=force)

    ignored = "NOT honoured by today's llama.cpp: it runs full attention"
    told = {
        "architecture": done.arch,
        "type": done.type,
        "size": human_bytes(done.bytes),
        "tensors": str(done.tensors),
        "plan": "honoured by llama.cpp" if done.honoured else ignored,
    }
    common.console.result(asdict(done), lambda: common.console.pairs([*told.items()]))
    prove = shlex.join(["hybridize", "verify", str(done.file), "--against", str(checkpoint)])
    proof = f"; prove it: {prove}"
    common.console.say(f"file: {done.file}{proof if stock_file is None else ''}")
