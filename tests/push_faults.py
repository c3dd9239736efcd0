"""Faults at every request of a push: what the Hub holds then, and after the same push again.

A push is listened to once, to know its requests. Then each of them is answered by each fault.
Run in a process of its own (`tests.faults.run_sweep`): the Hub's client reads its address from the
environment when it is imported.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.faults import KILL, Outcome
from tests.loopback_hub import TOKEN, Fault, LoopbackHub, serving

NAME = "me/hyb"
OPTIONS = ("--base-model", "a/b", "--license", "mit", "--no-verify", "-q")
# Status that the server answers, or how it drops the connection (see tests/loopback_hub.py).
FAULTS = {
    "429": 429,
    "500": 500,
    "503": 503,
    "dropped before": 0,
    "dropped after": 1,
    "403": 403,
    KILL: -9,
}
HARMLESS = "agent-harnesses"


def plain(request: tuple[str, str]) -> str:
    return re.sub(r"[0-9a-f]{40,64}", "…", " ".join(request).replace(NAME, "NAME"))


def held(hub: LoopbackHub, checkpoint: Path) -> str:
    """What the branch holds: the new checkpoint whole, or none of it."""
    names = {p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file()}
    there = set(hub.tree(NAME)) - {".gitattributes"} if NAME in hub.repositories else set()
    if not there:
        return "nothing new"
    equal = names - {"README.md", "hybrid/manifest.json"}
    same = all(hub.content(NAME, name) == (checkpoint / name).read_bytes() for name in equal)
    return "the new one" if there == names and same else f"BROKEN: {sorted(there ^ names)}"


def sweep(hub: LoopbackHub, checkpoint: Path, every: int) -> list[Outcome]:
    """Every fault at every `every`-th request."""
    from huggingface_hub.utils import disable_progress_bars

    from converter.common.errors import HubError
    from converter.common.hub import RetryPolicy
    from converter.publish.push import Destination, prepare, push

    disable_progress_bars()

    def go() -> int:
        upload = prepare(checkpoint, NAME, base_model="a/b", licence="mit")
        try:
            push(upload, Destination(NAME), lambda _: None, RetryPolicy(3, 0.01))
        except HubError:
            return 2
        return 0

    def start_and_die() -> int:
        command = [sys.executable, "-m", "converter", "push", str(checkpoint), NAME, *OPTIONS]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        hub.victim = process.pid
        return process.wait()

    assert go() == 0
    requests = [r for r in hub.requests if HARMLESS not in r[1]]
    outcomes = []
    for index in range(len(requests)):
        for number, (name, status) in enumerate(FAULTS.items()):
            if (index + number) % every:
                continue
            hub.repositories.clear()
            hub.objects.clear()
            hub.requests.clear()
            hub.faults = [Fault("", f"^(?!.*{HARMLESS})", status, after=index)]
            ended = start_and_die() if name == KILL else go()
            struck = [r for r in hub.requests if HARMLESS not in r[1]][index]
            left = held(hub, checkpoint)
            hub.faults = []
            again = go()
            outcomes.append((plain(struck), name, ended, left, again, held(hub, checkpoint)))
    return outcomes


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary, serving(Path(temporary) / "cas") as _hub:
        os.environ |= {
            "HF_ENDPOINT": _hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": f"{temporary}/home",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "*",
        }
        print(json.dumps(sweep(_hub, Path(sys.argv[1]), int(sys.argv[2]))))  # noqa: T201
