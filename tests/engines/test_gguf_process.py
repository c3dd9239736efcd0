"""llama.cpp in its own process: what kills it is told, and it never outlives us."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import psutil
import pytest

from converter.common.errors import GgufError
from converter.engines.gguf.llama_cpp import LlamaCppSettings
from tests.ggufs import Files, Refused, Told, exported, loaded_gguf, logits_of

ROOT = Path(__file__).parents[2]
# Stands before the real package in the path of llama.cpp's process, and dies in its place.
DYING = """
import os, sys
from pathlib import Path

here = str(Path(__file__).parent)
sys.path.remove(here)
del sys.modules["llama_cpp"]
import llama_cpp
real, load = llama_cpp.llama_decode, llama_cpp.llama_model_load_from_file
parameters = []

def llama_model_load_from_file(path, given):
    parameters.append(given)
    {at_load}
    return load(path, given)

def llama_decode(context, batch):
    {at_decode}
    return real(context, batch)

def die(number):
    if {when}:
        os.kill(os.getpid(), number)

llama_cpp.llama_decode = llama_decode
llama_cpp.llama_model_load_from_file = llama_model_load_from_file
"""
WITH_EXTRA, ALWAYS = "parameters[-1].use_extra_bufts", "True"
IDS = [5, 9, 250, 31, 7, 7, 100, 64, 3] * 4


@pytest.fixture
def dying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Makes llama.cpp's process die by a signal; ours is left alone."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "dying"))

    def dies(number: int, when: str, *, at_load: bool = False) -> None:
        (tmp_path / "dying").mkdir(exist_ok=True)
        strike = f"die({int(number)})"
        places = {"at_load": strike if at_load else "", "at_decode": "" if at_load else strike}
        text = DYING.format(when=when, **places)
        (tmp_path / "dying" / "llama_cpp.py").write_text(text)

    return dies
