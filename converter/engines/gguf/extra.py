"""The optional packages, with a clear word when one is missing."""

from __future__ import annotations

from types import ModuleType

from converter.common.errors import GgufError

INSTALL = (
    "install the extra: pip install gguf 'llama-cpp-python>=0.3.36' "
    "(builds llama.cpp: a C++ compiler is needed)"
)


def import_gguf() -> ModuleType:
    """The `gguf` package.

    Raises:
        GgufError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise _missing("gguf") from error
    return gguf


def import_llama_cpp() -> ModuleType:
    """The `llama_cpp` package.

    Raises:
        GgufError: llama-cpp-python is not installed, or its library does not load.
    """
    try:
        import llama_cpp
    except ImportError as error:
        raise _missing("llama-cpp-python") from error
    except (OSError, RuntimeError) as error:
        raise GgufError(
            "the library of llama-cpp-python does not load", got=error, next_step=INSTALL
        ) from error
    return llama_cpp


def _missing(package: str) -> GgufError:
    return GgufError(f"the package {package} is not installed", next_step=INSTALL)
