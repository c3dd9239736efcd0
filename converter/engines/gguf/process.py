"""llama.cpp in a process of its own: a file that makes it abort ends that process, not ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy

from converter.common.errors import GgufError
from converter.engines.gguf.extra import import_extra
from converter.engines.gguf.llama_cpp import LlamaCppModel, LlamaCppSettings, threads

_ROOT = Path(__file__).parents[3]
_SIGNALS = {-6: "it aborted", -11: "it crashed", -9: "it was killed, as when memory runs out"}


def ask(job: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """Run one of the jobs below; what it returned.

    Raises:
        GgufError: llama-cpp-python is missing, or the process failed or died.
    """
    import_extra("llama_cpp")
    start = (
        f"import sys; sys.path.insert(0, {str(_ROOT)!r}); "
        "from converter.engines.gguf.process import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", start, job],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
        # Else it would start a debugger on itself to say where it aborted.
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
    )
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        lines = done.stderr.strip().splitlines()
        fate = _SIGNALS.get(done.returncode, f"exit status {done.returncode}")
        raise GgufError(
            "llama.cpp failed on this file",
            where=request["file"],
            got=f"{fate}: {lines[-1]}" if lines else fate,
        ) from None
    if "problem" in answer:
        raise GgufError(answer["problem"], **answer["details"])
    return answer


def main() -> None:
    """The body of that process: a request on standard input, an answer on standard output."""
    request = json.loads(sys.stdin.read())
    try:
        answer = _JOBS[sys.argv[1]](request)
    except GgufError as error:
        names = {name.replace(" ", "_"): value for name, value in error.details.items()}
        answer = {"problem": error.problem, "details": names}
    print(json.dumps(answer))  # noqa: T201 - read by the process that started this one


def _quantise(request: dict[str, Any]) -> dict[str, Any]:
    """Turn a file of f32, f16 or bf16 into another type by llama.cpp's own quantiser."""
    api = import_extra("llama_cpp")
    parameters = api.llama_model_quantize_default_params()
    parameters.ftype = request["file_type"]
    parameters.nthread = threads()
    status = api.llama_model_quantize(request["file"].encode(), request["out"].encode(), parameters)
    if status != 0:
        raise GgufError(
            "llama.cpp does not quantise this file", where=request["file"], got=f"status {status}"
        )
    return {}


def _probe(request: dict[str, Any]) -> dict[str, Any]:
    """Logits of a text, as planned and with the window widened, and how texts are tokenized."""
    ids, new_tokens = request["ids"], request["new_tokens"]
    planned = LlamaCppSettings(len(ids) + new_tokens, True, None, request["batch_tokens"])
    logits: dict[str, Any] = {}
    report: dict[str, Any] = {}
    for name, overrides in (("planned", None), ("widened", request["widened"])):
        settings = replace(planned, overrides=overrides)
        with LlamaCppModel(Path(request["file"]), settings) as model:
            logits[name] = model.feed(ids, request["rows"])
            if name == "planned":
                prompt = ids[: request["prompt_tokens"]]
                report = {
                    "window_tokens": model.window_tokens,
                    "caches": model.caches,
                    "generated": list(model.generate(prompt, new_tokens)),
                    "tokens": [
                        model.tokenize(text, specials=True, around=True)
                        for text in request["texts"]
                    ],
                }
    numpy.savez(request["out"], **logits)
    return report


_JOBS = {"quantise": _quantise, "probe": _probe}
