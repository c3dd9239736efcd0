"""Faults at every request of a push: what the Hub holds then, and after the same push again.

A push is listened to once, to know its requests. Then each of them is answered by each fault.
Run in a process of its own (`run_push_sweep`): the Hub's client reads its address from the
environment when it is imported.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.faults import KILL
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


@dataclass(frozen=True)
class Outcome:
    """What came of one fault at one request.

    Attributes:
        request: method and path, without names and hashes.
        fault: its name.
        status: the exit status of the push; -9 for the killed.
        left: `nothing new`, `the new one`, or what is wrong.
        again: the exit status of the same push given again.
        then: what the Hub holds after that.
    """

    request: str
    fault: str
    status: int
    left: str
    again: int
    then: str


def plain(request: tuple[str, str]) -> str:
    """A request without names and hashes."""
    method, path = request
    path = re.sub(r"[0-9a-f]{40,64}", "…", path.replace(NAME, "NAME"))
    return f"{method} {path}"


def held(hub: LoopbackHub, checkpoint: Path) -> str:
    """What the branch holds: the new checkpoint whole, or none of it."""
    names = {p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file()}
    if NAME not in hub.repositories:
        return "nothing new"
    there = set(hub.tree(NAME)) - {".gitattributes"}
    if not there:
        return "nothing new"
    differs = {"README.md", "hybrid/manifest.json"}
    same = all(
        hub.content(NAME, name) == (checkpoint / name).read_bytes() for name in names - differs
    )
    return "the new one" if there == names and same else f"BROKEN: {sorted(there ^ names)}"


def sweep(checkpoint: Path, every: int) -> list[Outcome]:
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

    def start_and_die(hub: LoopbackHub) -> int:
        command = [sys.executable, "-m", "converter", "push", str(checkpoint), NAME, *OPTIONS]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        hub.victim = process.pid
        return process.wait()

    hub = _HUB
    hub.faults = []
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
            ended = start_and_die(hub) if name == KILL else go()
            struck = [r for r in hub.requests if HARMLESS not in r[1]][index]
            left = held(hub, checkpoint)
            hub.faults = []
            again = go()
            outcomes.append(Outcome(plain(struck), name, ended, left, again, held(hub, checkpoint)))
    return outcomes


_HUB: LoopbackHub


def run_push_sweep(checkpoint: Path, every: int = 1) -> list[Outcome]:
    """A sweep in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.push_faults", str(checkpoint), str(every)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [Outcome(**value) for value in json.loads(done.stdout.splitlines()[-1])]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary, serving(Path(temporary) / "cas") as _HUB:
        os.environ |= {
            "HF_ENDPOINT": _HUB.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": f"{temporary}/home",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "*",
        }
        found = sweep(Path(sys.argv[1]), int(sys.argv[2]))
    print(json.dumps([asdict(outcome) for outcome in found]))  # noqa: T201
