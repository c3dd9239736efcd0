"""llama.cpp in a process of its own: a file that makes it crash ends that process, not ours."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy
from numpy.typing import NDArray

from converter.common.errors import GgufError
from converter.engines.gguf.extra import check_installed
from converter.engines.gguf.llama_cpp import LlamaCppSettings

_ROOT = Path(__file__).parents[3]
_START = (
    f"import sys; sys.path.insert(0, {str(_ROOT)!r}); "
    "from converter.engines.gguf.worker import main; main()"
)
_AGAIN = "download or export the file again"
# What a signal that ends llama.cpp mostly means, and what to do.
_CAUSES: dict[int, tuple[str, str]] = {
    signal.SIGABRT: ("it met what it does not expect, as in damaged metadata", _AGAIN),
    signal.SIGBUS: ("the file was cut short while it was read, or the disk fails", _AGAIN),
    signal.SIGILL: (
        "it was built for another processor",
        "build llama-cpp-python on this machine; docs/llama-cpp.md says how",
    ),
    signal.SIGKILL: (
        "it was killed, as when memory runs out",
        "close other programs, give a smaller --context, or export a smaller --type",
    ),
}
# How wrong code in a processor's kernels ends. An abort is a decision, a kill comes from outside.
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)


class _CrashError(GgufError):
    """The process died by a signal of `_CRASHES`."""


class LlamaCppProcess:
    """A file loaded by llama.cpp in another process; use it as a context manager.

    Where llama.cpp crashes in its kernels for a processor (those for AMX that an older compiler
    built; ggml-org/llama.cpp#20824), it is started once more without them.

    Args:
        warn: is told when that was needed.

    Attributes:
        settings: with which it was loaded.
        window_tokens, caches: as `LlamaCppModel` has them.

    Raises:
        GgufError: llama.cpp refuses the file, or died of it.
    """

    def __init__(self, path: Path, settings: LlamaCppSettings, warn: Callable[[str], None]) -> None:
        self.settings, self._path, self._warn = settings, path, warn
        try:
            self._load()
        except _CrashError as crash:
            self._load_plainly(crash)

    def _load(self) -> None:
        self._child, self._is_empty = _Child(self._path), True
        file, settings = str(self._path.absolute()), asdict(self.settings)
        try:
            self.window_tokens, caches = self._child.ask("load", file=file, settings=settings)
        except BaseException:
            self.close()
            raise
        self.caches = [(cells, layers) for cells, layers in caches]

    def _load_plainly(self, crash: _CrashError) -> None:
        """Load it again without the kernels that may have crashed."""
        if not self.settings.extra_buffers:
            raise crash
        self.close()
        self._warn(
            f"warning: llama.cpp crashed ({crash.details['got']}) and is started again without the "
            "weights laid out for this processor: it may read prompts more slowly; "
            "docs/llama-cpp.md (AMX) says how to mend it"
        )
        self.settings = replace(self.settings, extra_buffers=False)
        self._load()

    def __enter__(self) -> LlamaCppProcess:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._child.close()

    def clear(self) -> None:
        """Forget every token."""
        self._child.ask("clear")
        self._is_empty = True

    def feed(self, ids: Sequence[int], rows: Sequence[int]) -> NDArray[Any]:
        """Compute tokens after those before: logits (rows, vocabulary) of some, ascending."""
        logits: NDArray[Any] = self._fed("feed", ids=list(ids), rows=list(rows))
        return logits

    def _fed(self, job: str, **request: Any) -> Any:
        try:
            answer = self._child.ask(job, **request)
        except _CrashError as crash:
            # What was fed before would be lost.
            if not self._is_empty:
                raise
            self._load_plainly(crash)
            answer = self._child.ask(job, **request)
        self._is_empty = False
        return answer

    def next_token(self, ids: Sequence[int]) -> int:
        """Compute at most a batch of tokens after those before, and draw the one after them."""
        return int(self._fed("next_token", ids=list(ids)))

    def tokenize(self, text: str, *, around: bool) -> list[int]:
        """Token ids of a text, as `LlamaCppModel.tokenize`."""
        ids: list[int] = self._child.ask("tokenize", text=text, around=around)
        return ids

    def piece(self, token: int) -> bytes:
        """The bytes of a token; none for special ones."""
        return bytes(self._child.ask("piece", token=token))

    def ends(self, token: int) -> bool:
        """Whether a token ends an answer."""
        return bool(self._child.ask("ends", token=token))

    def generate(self, ids: Sequence[int], count: int) -> Iterator[int]:
        """The most likely tokens after a text, one at a time, from an empty cache."""
        self.clear()
        logits = self.feed(ids, [len(ids) - 1])
        for _ in range(count):
            token = int(logits[0].argmax())
            yield token
            logits = self.feed([token], [0])


def quantise(file: Path, out: Path, file_type: int) -> None:
    """Turn a file of f32, f16 or bf16 into another type by llama.cpp's own quantiser.

    Raises:
        GgufError: llama.cpp refuses, or died of it.
    """
    child = _Child(file)
    try:
        names = {"file": str(file.absolute()), "out": str(out.absolute())}
        child.ask("quantise", **names, file_type=file_type)
    finally:
        child.close()


class _Child:
    """The process and its pipes."""

    def __init__(self, file: Path) -> None:
        check_installed("llama_cpp")
        self._file, self._told = file, TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._told,
            # Else it would start a debugger on itself to say where it aborted.
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )

    def ask(self, job: str, **request: Any) -> Any:
        """What the process answers.

        Raises:
            GgufError: it refuses, or died.
        """
        pipe: Any = self._process.stdin
        answers: Any = self._process.stdout
        try:
            pipe.write(json.dumps({"job": job, **request}).encode() + b"\n")
            pipe.flush()
        except BrokenPipeError:
            raise self._death() from None
        line = answers.readline()
        if not line.endswith(b"\n"):
            raise self._death()
        answer: dict[str, Any] = json.loads(line)
        if "problem" in answer:
            raise GgufError(answer["problem"], **answer["details"])
        if "shape" not in answer:
            return answer["value"]
        raw = answers.read(4 * math.prod(answer["shape"]))
        if len(raw) < 4 * math.prod(answer["shape"]):
            raise self._death()
        return numpy.frombuffer(raw, numpy.float32).reshape(answer["shape"])

    def _death(self) -> GgufError:
        """What it died of, and what to do."""
        status = self._process.wait()
        self._told.seek(0)
        lines = self._told.read().decode("utf-8", "replace").strip().splitlines()
        # An assertion names the place where llama.cpp was built, and the file there.
        last = ": " + re.sub(r"^\S*/", "", lines[-1]) if lines else ""
        if status >= 0:
            what = "llama.cpp failed on this file"
            return GgufError(what, where=self._file, got=f"exit status {status}{last}")
        name, kind = signal.Signals(-status).name, _CrashError if -status in _CRASHES else GgufError
        cause, remedy = _CAUSES.get(-status, ("the file may be damaged", _AGAIN))
        return kind(
            f"llama.cpp died: {cause}",
            where=self._file,
            got=f"{name}{last}",
            next_step=remedy,
        )

    def close(self) -> None:
        """End it, whatever it is doing."""
        self._process.kill()
        self._process.communicate()
        self._told.close()
