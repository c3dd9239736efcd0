"""What runs in llama.cpp's own process: it does what `process.py` asks, one request after another.

A request is a line of JSON on standard input. An answer is one on standard output, followed by the
bytes of an array when it gives a shape.
"""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy
import psutil

from converter.common.errors import GgufError
from converter.engines.gguf.extra import import_extra
from converter.engines.gguf.llama_cpp import LlamaCppModel, LlamaCppSettings, threads


def main() -> None:
    """Answer requests until the process that started this one closes its end, or dies."""
    # An interrupt is for that process, which ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    # What llama.cpp prints must not come between answers.
    os.dup2(2, 1)
    # A refusal to allocate can be told; being killed because the machine has run out cannot.
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    told = [limit for limit in limits if limit != resource.RLIM_INFINITY]
    least = min([psutil.virtual_memory().available, *told])
    resource.setrlimit(resource.RLIMIT_DATA, (least, limits[1]))
    requests: SimpleQueue[dict[str, Any]] = SimpleQueue()
    Thread(target=_listen, args=(requests,), daemon=True).start()
    jobs: dict[str, Callable[..., Any]] = {"quantise": _quantise}
    while True:
        request = requests.get()
        job = request.pop("job")
        try:
            if job == "load":
                model = LlamaCppModel(
                    Path(request["file"]), LlamaCppSettings(**request["settings"])
                )
                value: Any = [model.window_tokens, model.caches]
                jobs |= {name: getattr(model, name) for name in _MODEL_JOBS}
            else:
                value = jobs[job](**request)
            answers.write(_encoded(value))
        except GgufError as error:
            names = {name.replace(" ", "_"): told for name, told in error.details.items()}
            answers.write(_line({"problem": error.problem, "details": names}))
        answers.flush()


_MODEL_JOBS = ("clear", "feed", "next_token", "tokenize", "piece", "ends")


def _listen(requests: SimpleQueue[dict[str, Any]]) -> None:
    """Pass requests on, and end this process with the other, whatever llama.cpp is doing."""
    # Not sys.stdin, which Python closes when it ends, waiting for whoever reads it.
    with os.fdopen(os.dup(0), "rb") as lines:
        for line in lines:
            requests.put(json.loads(line))
    os._exit(0)


def _line(answer: Mapping[str, Any]) -> bytes:
    return json.dumps(answer).encode() + b"\n"


def _encoded(value: Any) -> bytes:
    if isinstance(value, numpy.ndarray):
        return _line({"shape": value.shape}) + value.tobytes()
    return _line({"value": list(value) if isinstance(value, bytes) else value})


def _quantise(file: str, out: str, file_type: int) -> None:
    """Turn a file of f32, f16 or bf16 into another type by llama.cpp's own quantiser."""
    api = import_extra("llama_cpp")
    parameters = api.llama_model_quantize_default_params()
    parameters.ftype = file_type
    parameters.nthread = threads()
    status = api.llama_model_quantize(file.encode(), out.encode(), parameters)
    if status != 0:
        what = "llama.cpp does not quantise this file"
        raise GgufError(what, where=file, got=f"status {status}")
