"""The optional packages, with a clear word when one is missing."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from converter.common.errors import GgufError

_EXTRAS = {
    "gguf": 'pip install "hybridize[gguf]"',
    "llama_cpp": 'pip install "hybridize[llama-cpp]" (builds llama.cpp: a C++ compiler is needed)',
}


def import_extra(name: str) -> Any:
    """The module `gguf` or `llama_cpp`.

    Raises:
        GgufError: its package is not installed, or its library does not load.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise _not_installed(name) from error
    except (OSError, RuntimeError) as error:
        raise GgufError(
            f"the library of {_package(name)} does not load", got=error, next_step=_EXTRAS[name]
        ) from error


def check_installed(name: str) -> None:
    """Refuse to go on without a module, of which nothing is loaded.

    Raises:
        GgufError: its package is not installed.
    """
    if find_spec(name) is None:
        raise _not_installed(name)


def _not_installed(name: str) -> GgufError:
    return GgufError(f"the package {_package(name)} is not installed", next_step=_EXTRAS[name])


def _package(name: str) -> str:
    return {"llama_cpp": "llama-cpp-python"}.get(name, name)


def file_type(kind: str) -> int:
    """llama.cpp's number of one of the types of files (include/llama.h, llama_ftype)."""
    names = import_extra("gguf").LlamaFileType
    return int(names["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"])
