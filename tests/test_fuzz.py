"""A thousand damaged files: every command succeeds, or refuses with one message."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converter.common.errors import UsageError
from converter.publish.metadata import licence_of
from tests import fuzz
from tests.fuzz_inputs import KINDS, PARTS

INPUTS = 1000


def test_no_damaged_file_ends_a_command_otherwise_than_with_one_message() -> None:
    command = [*fuzz.COMMAND, "--inputs", str(INPUTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].startswith(f"| all | {INPUTS} |")


def test_every_command_does_what_it_should_with_what_is_not_damaged() -> None:
    command = [*fuzz.COMMAND, "--inputs", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert {result["kind"] for result in results} == {kind.name for kind in KINDS}
    assert not [result for result in results if result["outcome"] != "ok"]


def fail() -> int:
    raise ValueError("no")


def wait() -> int:
    time.sleep(60)
    return 0


def die() -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def fill() -> int:
    return len(bytearray(1 << 33))


def refuse() -> int:
    raise UsageError("no")


def say_nothing() -> int:
    return 2


# A process with threads, as a worker of pytest-xdist is, may be forked here: the copy runs Python.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("part", "outcome"),
    [
        (fail, "traceback"),
        (wait, "hang"),
        (die, "signal"),
        (fill, "traceback"),
        (refuse, "refused"),
        (say_nothing, "no message"),
        (lambda: 0, "ok"),
    ],
)
def test_what_comes_of_an_input_is_told(
    part: Callable[[], int], outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PARTS, "part", part)
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    (tmp_path / "work").mkdir()
    assert fuzz.run_command(0, "a kind", ["part"], tmp_path).outcome == outcome


def test_the_same_seed_gives_the_same_inputs() -> None:
    """What is found can be looked at again."""
    code = (
        "import json, sys; from random import Random; from tests import mutations;"
        "given = json.dumps({'a': [1, 2, {'b': 'c'}], 'd': None}).encode();"
        "made = [mutations.json_of(Random(f'1:{n}'), given) for n in range(50)];"
        "sys.stdout.buffer.write(b'\\n'.join(made))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert len(set(runs[0].splitlines())) > 30


# A folder is written once, and the file in it anew for each example.
FUZZED = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
CARDS = JSON.map(lambda value: f"---\n{json.dumps({'license': value})}\n---\n".encode())


@FUZZED
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode) | CARDS)
def test_any_card(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "README.md").write_bytes(content)
    licence_of(tmp_path, "a/b")
