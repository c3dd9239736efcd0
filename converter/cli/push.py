"""`hybridize push`: publish a checkpoint on the Hub."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from converter.cli.grouping import Section, command, option
from converter.cli.options import PATH, Common, common_options
from converter.common.errors import UsageError


@command()
@click.argument("checkpoint", type=PATH)
@click.argument("repository", metavar="OWNER/NAME")
@option(Section.OUTPUT, "--private", "Only you see it. A public repository is refused.")
@option(
    Section.OUTPUT,
    "--revision --branch revision BRANCH",
    "Push to this branch, made when it is missing, or to an open refs/pr/N. [default: main]",
    default="main",
)
@option(Section.OUTPUT, "--pull-request", "Propose it; the same checkpoint is proposed once.")
@option(Section.SOURCE, "--base-model OWNER/NAME", "The original, when it was a folder.")
@option(Section.SOURCE, "--license licence ID", "Its licence, when its folder did not say.")
@option(Section.OUTPUT, "--no-verify", "Push it unproved.")
@common_options(recipe=False)
def push(
    common: Common,
    checkpoint: Path,
    repository: str,
    private: bool,
    revision: str,
    pull_request: bool,
    base_model: str | None,
    licence: str | None,
    no_verify: bool,
) -> int:
    """Publish CHECKPOINT on the Hub as OWNER/NAME.

    It is proved first; then only what changed is sent, in one commit.
    """
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    from converter.checkpoint.verify.checks import verify
    from converter.common.units import human_bytes
    from converter.publish.push import Destination, check_destination, prepare
    from converter.publish.push import push as send

    console = common.console
    if common.offline:
        raise UsageError("pushing needs the network", where="--offline")
    destination = Destination(repository, private, revision, pull_request)
    check_destination(destination)
    upload = prepare(checkpoint, repository, base_model=base_model, licence=licence)
    if not no_verify:
        console.say("proving the checkpoint first (--no-verify leaves this out)")
        report = verify(checkpoint, None, say=console.say)
        if not report.ok:
            console.result(report.to_json(), lambda: None)
            console.say(f"FAILED, nothing was sent: {', '.join(report.failed)}")
            return 1
    if console.verbosity < 0:
        disable_progress_bars()
    pushed = send(upload, destination, console.say)

    def show() -> None:
        told = {
            "sent": f"{len(pushed.sent)} files, {human_bytes(pushed.sent_bytes)}",
            "there already": f"{pushed.unchanged} files",
            "removed": ", ".join(pushed.deleted) or "none",
        }
        if pushed.pull_request:
            told["pull request"] = pushed.pull_request
        console.print(f"{repository} at {pushed.revision}, commit {pushed.commit}")
        console.pairs([*told.items()])

    console.result(asdict(pushed), show)
    return 0
