"""Renders chat templates, which are programs of strangers, in a process that may be lost.

This file is started by path with `python -I` and imports nothing of ours. For each line of JSON on
stdin, the options of transformers' `render_jinja_template`, it prints one: a text, what the
template refuses, or an error. One that computes for too long ends the process by SIGPROF.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from contextlib import suppress

import psutil
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

# Real templates take milliseconds and a megabyte.
_MEMORY_BYTES = 512 << 20
_SECONDS = 3


def main() -> None:
    """Answer requests until there are no more."""
    # The process that asks is interrupted by Ctrl-C, and this one ends with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    allowed = psutil.Process().memory_info().vms + _MEMORY_BYTES
    # macOS knows no such limit; there the time and the text's length are what holds.
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    for line in sys.stdin:
        request = json.loads(line)
        largest = (1 << 20) + 4 * len(line)
        signal.setitimer(signal.ITIMER_PROF, _SECONDS)
        try:
            texts, _ = render_jinja_template(**request)
            # Half of a pair of surrogates is no text, and a tokenizer takes much memory for a text.
            if len(texts[0].encode()) > largest:
                raise ValueError(f"it makes a text of {len(texts[0]):,} characters")
            answer = {"text": texts[0]}
        except TemplateError as error:
            answer = {"refused": str(error)}
        except Exception as error:  # noqa: BLE001 - a template raises what it likes
            answer = {"error": str(error) or type(error).__name__}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)  # noqa: T201 - read by the process that asked


if __name__ == "__main__":
    main()
