"""`hybridize run` as a conversation: at a terminal, with the original, interrupted and stopped."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from converter.cli.chat import Conversation, converse
from converter.cli.console import Console
from converter.inference.completion import (
    Completion,
    GenerationSettings,
    SecondInterrupt,
    StoppingText,
)
from converter.inference.generate import Runner, RunSettings
from converter.inference.load import Placement
from tests.conftest import run_cli

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
PROMPT = "The quick brown fox jumps over the lazy dog, again and again and again."


@pytest.fixture(scope="module")
def checkpoint(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hybrid that can chat; what its layers see matters, so that the original differs."""
    root = tmp_path_factory.mktemp("chat")
    source = Path(shutil.copytree(sources["qwen3"], root / "source"))
    (source / "chat_template.jinja").write_text(TEMPLATE)
    options = ("--layers", "1", "--window", "4", "-q")
    assert run_cli("convert", source, root / "hybrid", *options) == 0
    return root / "hybrid"


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A private copy of the checkpoint."""
    return Path(shutil.copytree(checkpoint, tmp_path / "hybrid"))


Told = Callable[..., dict[str, Any]]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    """Runs a command; the JSON object that it prints."""

    def value(*arguments: object) -> dict[str, Any]:
        capsys.readouterr()
        assert run_cli(*arguments, "--json", "-q") == 0
        return dict(json.loads(capsys.readouterr().out))

    return value


def texts(told: Told, *arguments: object) -> tuple[str, str | None]:
    """What the hybrid says, and the original."""
    value = told("run", *arguments)
    original = value.get("original")
    return value["text"], original["text"] if original else None


def test_the_original_answers_beside_the_hybrid(
    checkpoint: Path, told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (checkpoint, "-p", PROMPT, "-n", 12)
    hybrid, original = texts(told, *command, "--original")
    source = checkpoint.parent / "source"
    full = ",".join(map(str, range(told("inspect", source)["shape"]["layers"])))
    whole = checkpoint.parent / "whole"
    assert run_cli("convert", source, whole, "--layers", full, "--window", "4", "-q") == 0
    assert original == texts(told, whole, *command[1:])[0] != hybrid
    assert hybrid == texts(told, *command)[0]
    capsys.readouterr()
    assert run_cli("run", *command, "--original", "-q") == 0
    assert capsys.readouterr().out == f"hybrid: {hybrid}\noriginal: {original}\n"


def test_each_goes_on_from_its_own_answers(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PROMPT}\nand?\n"))
    chat = ("run", checkpoint, "--chat", "-n", 9, "--json", "-q", "--system", "Be brief.")
    assert run_cli(*chat, "--original") == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    for name in ("hybrid", "original"):
        said, then = (one if name == "hybrid" else one["original"] for one in (first, second))
        request = f"<system>Be brief.<user>{PROMPT}<assistant>{said['text']}<user>and?<assistant>"
        assert run_cli("run", checkpoint, "-p", request, "-n", 9, "--json", "--original", "-q") == 0
        value = json.loads(capsys.readouterr().out)
        assert then["text"] == (value if name == "hybrid" else value["original"])["text"]


def test_the_checkpoints_own_settings_say_how_to_draw(folder: Path, told: Told) -> None:
    """Greedy comes with a temperature of 0, or where they say nothing; each limit can force it."""
    command = (folder, "-p", PROMPT, "-n", 16)
    likely = texts(told, *command)
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text()) | {"do_sample": True, "temperature": 3.0}
    path.write_text(json.dumps(settings))
    drawn = texts(told, *command)
    assert drawn == texts(told, *command, "--seed", 0) != texts(told, *command, "--seed", 1)
    assert likely == texts(told, *command, "--temp", 0) != drawn
    for limit in (("--top-k", 1), ("--top-p", 0), ("--min-p", 1)):
        assert likely == texts(told, *command, *limit), limit
    path.write_text(json.dumps(settings | {"top_k": 1}))
    assert likely == texts(told, *command) != texts(told, *command, "--top-k", 0)


@pytest.mark.parametrize("pieces", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("three", "o t"), "one tw"),
        ("one tw", ("two",), "one tw"),
        ("aaab", ("aab",), "a"),
        ("anything", (), "anything"),
    ],
)
def test_a_text_is_shown_up_to_its_stop(
    text: str, stop: tuple[str, ...], shown: str, pieces: int
) -> None:
    found: list[str] = []
    stopping = StoppingText(stop, found.append)
    for start in range(0, len(text), pieces):
        stopping.add(text[start : start + pieces])
    stopping.end()
    assert "".join(found) == shown
    assert stopping.stopped == (shown != text)


def test_a_stop_text_ends_the_answer(
    checkpoint: Path, told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (checkpoint, "-p", PROMPT, "-n", 24, "--temp", 3)
    whole, _ = texts(told, *command)
    # Of bytes drawn at random, some are letters.
    stop = next(letter for letter in whole[4:] if letter.isascii() and letter.isprintable())
    value = told("run", *command, "--stop", "never said", "--stop", stop)
    assert value["text"] == whole[: whole.index(stop)]
    assert value["new_tokens"] < 24
    capsys.readouterr()
    assert run_cli("run", *command, "--stop", stop, "-q") == 0
    assert capsys.readouterr().out == value["text"] + "\n"


def test_a_prompt_from_a_file(checkpoint: Path, tmp_path: Path, told: Told) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT)
    from_file = texts(told, checkpoint, "-f", tmp_path / "prompt.txt", "-n", 5)
    assert from_file == texts(told, checkpoint, "-p", PROMPT, "-n", 5)


def test_an_interrupt_ends_the_answer_and_not_the_chat(checkpoint: Path) -> None:
    settings = RunSettings(GenerationSettings(200))
    runner = Runner(checkpoint, Placement("cpu", "float32"), settings)
    request = runner.prompt_of([{"role": "user", "content": PROMPT}])
    pieces: list[str] = []

    def interrupt(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    done = runner.complete(request, is_chat=True, show=interrupt)
    assert done.interrupted and 0 < done.new_tokens < 200
    assert done.text == "".join(pieces)
    again = runner.complete(request, is_chat=True, show=lambda _piece: None)
    assert again.text.startswith(done.text) and not again.interrupted
    with pytest.raises(KeyboardInterrupt):
        runner.complete(request, is_chat=False, show=lambda _: os.kill(os.getpid(), signal.SIGINT))


def test_an_interrupt_right_behind_an_answer_ends_no_chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Typed(io.StringIO):
        def isatty(self) -> bool:
            return True

    def complete(request: str, *, is_chat: bool, show: Callable[[str], None]) -> Completion:
        assert is_chat
        show("well")
        if "three" in request:
            raise SecondInterrupt
        if "one" in request:
            raise KeyboardInterrupt
        return Completion("well", 1, 1, 1.0, 0.0, 1, 1)

    monkeypatch.setattr("sys.stdin", Typed("one\ntwo\nthree\nfour\n"))
    texts = Conversation(
        Console(False, -1), lambda turns: str(turns[-1]["content"]), {"hybrid": complete}, None
    )
    with pytest.raises(SecondInterrupt):
        converse(texts)
    assert capsys.readouterr().out == "well" + "\n" + "well\n" + "well"


@pytest.fixture
def terminal(checkpoint: Path) -> Iterator[Callable[[bytes, bytes], bytes]]:
    """A chat at a terminal of its own: type something, and get what comes up to some words."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "converter", "run", str(checkpoint), "-n", "100"],
        **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
        start_new_session=True,
        # Ctrl-C is a signal to those whose terminal it is.
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)

    came = b""

    def typed(keys: bytes, awaited: bytes) -> bytes:
        nonlocal came
        os.write(ours, keys)
        end = time.monotonic() + 100
        # Anything, where nothing is awaited.
        while (not came or awaited not in came) and time.monotonic() < end:
            if select.select([ours], [], [], 0.2)[0]:
                try:
                    came += os.read(ours, 1024)
                except OSError:
                    break
        assert came and awaited in came, came
        end_of_answer = came.index(awaited) + max(1, len(awaited))
        answer, came = came[:end_of_answer], came[end_of_answer:]
        return answer

    yield typed
    try:
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_a_terminal_gets_a_chat(terminal: Callable[[bytes, bytes], bytes]) -> None:
    assert b"Ctrl-D leaves" in terminal(b"", b"> ")
    assert b"forget the conversation" in terminal(b"/help\n", b"> ")
    terminal(b"hello\n", b"hello\r\n")
    # Once it has begun to answer.
    answer = terminal(b"", b"")
    answer += terminal(b"\x03", b"> ")
    assert b"100 new" not in answer and b"Traceback" not in answer
    terminal(b"x" * 200 + b"\\\n" + b"y" * 400 + b"\n", b"error: the prompt cannot be used")
    terminal(b"", b"> ")
    terminal(b"/reset\n", b"> ")
    assert b"KV cache" in terminal(b"once more\n", b"\n> ")
    terminal(b"/exit\n", b"\n")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-p", "a", "--system", "b"), "only a chat has a system prompt"),
        (("-p", "a", "-f", "b"), "give one of the two"),
        (("-f", "nowhere.txt"), "nowhere.txt"),
        (("-p", "a", "--stop", ""), "a stop text is empty"),
        (("-p", "a", "--top-p", "nan"), "--top-p"),
    ],
)
def test_what_makes_no_sense_is_told(
    options: tuple[str, ...], words: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run_cli("run", checkpoint, *options) == 2
    assert words in capsys.readouterr().err
