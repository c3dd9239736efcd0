"""llama.cpp in its own process: what kills it is told, and it never outlives us."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import psutil
import pytest

from converter.common.errors import GgufError
from converter.engines.gguf.llama_cpp import LlamaCppSettings
from converter.engines.gguf.process import LlamaCppProcess
from converter.model.families.stock_gguf import text
from tests.conftest import run_cli
from tests.ggufs import Files, Refused, Told, exported, loaded_gguf, rewritten

ROOT = Path(__file__).parents[2]
IDS = [5, 9, 250, 31, 7, 7, 100, 64, 3] * 4
# Stands before the real package in the path of llama.cpp's process: something happens there first.
BEFORE = """
import os, sys, time
from pathlib import Path

sys.path.remove(str(Path(__file__).parent))
del sys.modules["llama_cpp"]
import llama_cpp

real, given = llama_cpp.{function}, []
load = llama_cpp.llama_model_load_from_file

def remember(path, parameters):
    given.append(parameters.use_extra_bufts)
    return load(path, parameters)

def first(*arguments):
    {event}
    return real(*arguments)

llama_cpp.llama_model_load_from_file = remember
llama_cpp.{function} = first
"""
DECODE, INIT = "llama_decode", "llama_init_from_model"
Before = Callable[[str, str], None]


@pytest.fixture
def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Before:
    """Makes something happen in llama.cpp's process before a function; ours is left alone."""

    def prepare(function: str, event: str) -> None:
        (tmp_path / "before").mkdir()
        stand_in = BEFORE.format(function=function, event=event)
        (tmp_path / "before" / "llama_cpp.py").write_text(stand_in)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "before"))

    return prepare


def dies(number: int, *, only_with_extra_buffers: bool = False) -> str:
    condition = "given[-1]" if only_with_extra_buffers else "True"
    return f"if {condition}: os.kill(os.getpid(), {int(number)})"


@pytest.fixture(scope="module")
def rounded(hybrid: Files, tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("rounded")
    return lambda kind: exported(hybrid("qwen3"), root / f"{kind}.gguf", "--type", kind, "--force")


@pytest.mark.parametrize("kind", ["q8_0", "q4_k_m"])
def test_without_extra_buffers_the_logits_are_the_same(kind: str, rounded: Files) -> None:
    """Other kernels add in another order; activations are rounded to eight bits in both."""
    found = []
    for extra in (True, False):
        settings = LlamaCppSettings(len(IDS), exact=True, extra_buffers=extra)
        with loaded_gguf(rounded(kind), settings) as engine:
            found.append(engine.feed(IDS, range(len(IDS))))
    assert numpy.abs(found[0] - found[1]).max() < 0.05 * found[0].std()


@pytest.mark.parametrize("function", [DECODE, INIT])
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGILL], ids=lambda n: n.name)
def test_a_crash_with_extra_buffers_is_told_and_survived(
    number: signal.Signals,
    function: str,
    rounded: Files,
    told: Told,
    before: Before,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ("run", rounded("q8_0"), "--prompt", "the thing in the inn", "--max-new", 8)
    expected = told(*command)
    before(function, dies(number, only_with_extra_buffers=True))
    assert run_cli(*command, "--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["text"] == expected["text"]
    assert printed.err.count("warning: llama.cpp crashed") == 1
    assert number.name in printed.err and "docs/llama-cpp.md" in printed.err


def test_a_proof_survives_it_too(
    hybrid: Files, rounded: Files, before: Before, capsys: pytest.CaptureFixture[str]
) -> None:
    before(DECODE, dies(signal.SIGSEGV, only_with_extra_buffers=True))
    assert run_cli("verify", rounded("q8_0"), "--against", hybrid("qwen3")) == 0
    # The second load of the file knows.
    assert capsys.readouterr().err.count("warning: llama.cpp crashed") == 1


FATES = {
    signal.SIGABRT: "damaged metadata",
    signal.SIGBUS: "cut short",
    signal.SIGFPE: "may be damaged",
    signal.SIGILL: "another processor",
    signal.SIGKILL: "memory runs out",
    signal.SIGSEGV: "may be damaged",
}


@pytest.mark.parametrize("number", FATES, ids=lambda number: number.name)
def test_every_death_is_one_message(
    number: signal.Signals, rounded: Files, refused: Refused, before: Before
) -> None:
    before(DECODE, dies(number))
    message = refused("run", rounded("q8_0"), "--prompt", "the thing", "-q")
    assert "llama.cpp died: " in message and FATES[number] in message
    assert f"got: {number.name}" in message
    assert "next step: " in message and "Traceback" not in message


def test_a_death_in_the_middle_of_a_text_does_not_begin_it_again(
    rounded: Files, before: Before, capsys: pytest.CaptureFixture[str]
) -> None:
    before(DECODE, f"given.append(1); len(given) > 4 and os.kill(os.getpid(), {signal.SIGSEGV:d})")
    assert run_cli("run", rounded("q8_0"), "--prompt", "the thing") == 2
    printed = capsys.readouterr()
    assert printed.out and "SIGSEGV" in printed.err and "started again" not in printed.err


def test_an_exception_there_is_one_message(
    rounded: Files, refused: Refused, before: Before
) -> None:
    before(DECODE, "raise MemoryError('no more')")
    message = refused("run", rounded("q8_0"), "--prompt", "a", "-q")
    assert "exit status 1: MemoryError: no more" in message and "Traceback" not in message


def test_a_template_that_wants_too_much_memory_is_refused(
    gguf: Files, tmp_path: Path, refused: Refused
) -> None:
    changes = {"tokenizer.chat_template": text("{{ 'x' * 10**9 }}")}
    file = rewritten(gguf("qwen3"), tmp_path / "out.gguf", changes)
    message = refused("run", file, "--chat", "--prompt", "a", "-q")
    assert "chat template cannot be used" in message and "Memory" in message


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)], ids=["SIGINT", "SIGKILL"]
)
def test_it_ends_with_the_command_whatever_it_is_doing(
    number: signal.Signals, status: int, rounded: Files, tmp_path: Path, before: Before
) -> None:
    before(DECODE, f"Path({str(tmp_path / 'busy')!r}).touch(); time.sleep(600)")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from converter.cli import main; main()"
    command = [sys.executable, "-c", code, "run", rounded("q8_0"), "--prompt", "a"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE)
    with process:
        watched = psutil.Process(process.pid)
        while not (tmp_path / "busy").exists():
            assert process.poll() is None
        (engine,) = watched.children()
        # As a terminal sends an interrupt: to both.
        os.killpg(process.pid, number) if number == signal.SIGINT else process.kill()
        _, said = process.communicate(timeout=60)
    assert process.returncode == status
    assert (b"interrupted" in said) == (number == signal.SIGINT)
    assert engine.wait(timeout=60) is None or not engine.is_running()


def test_a_process_that_is_gone_is_noticed_at_the_next_request(rounded: Files) -> None:
    before = set(psutil.Process().children())
    with LlamaCppProcess(rounded("q8_0"), LlamaCppSettings(32), print) as engine:
        (child,) = set(psutil.Process().children()) - before
        child.kill()
        with pytest.raises(GgufError, match="killed") as caught:
            engine.feed(IDS, [0])
        assert caught.value.details["got"] == "SIGKILL"
