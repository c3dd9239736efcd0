"""The error tree and how an error reads."""

from __future__ import annotations

import errno
import inspect
import re

import pytest

from converter.common import errors
from converter.common.errors import HybridizeError, SourceError, UsageError, refusing

CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, HybridizeError)
}


def test_the_tree_in_the_docstring_lists_every_error() -> None:
    assert set(re.findall(r"\b\w+Error\b", errors.__doc__ or "")) == set(CLASSES)


def test_the_tree_in_the_docstring_shows_who_descends_from_whom() -> None:
    parent = ""
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"(│?\s*)[├└]── (\w+)", line)
        if found:
            indented, name = bool(found[1]), found[2]
            assert CLASSES[name].__bases__ == (CLASSES[parent] if indented else HybridizeError,)
            parent = parent if indented else name


@pytest.mark.parametrize("kind", CLASSES.values(), ids=CLASSES)
def test_every_error_is_documented_and_tells_its_details(kind: type[HybridizeError]) -> None:
    assert kind.__doc__
    error = kind("it broke", where="a.json", expected=3, got=0, next_step="mend it")
    said = "it broke\n  where: a.json\n  expected: 3\n  got: 0\n  next step: mend it"
    assert str(error) == said


def test_details_that_are_not_given_are_not_told() -> None:
    assert str(HybridizeError("it broke")) == "it broke"
    assert str(HybridizeError("it broke", got=False)) == "it broke\n  got: False"
    assert HybridizeError("it broke", where="x").details == {"where": "x"}


class Panic(BaseException):
    """As pyo3's, which is no Exception."""


@pytest.mark.parametrize(
    "raised", [ValueError("a\n  b"), MemoryError(), Panic("a b"), RecursionError(), StopIteration()]
)
def test_whatever_a_library_raises_over_a_foreign_file_is_a_refusal(raised: BaseException) -> None:
    with pytest.raises(SourceError) as error, refusing("x cannot be loaded", "f", SourceError):
        raise raised
    assert error.value.details == {
        "where": "f",
        "got": "a b" if str(raised) else type(raised).__name__,
    }


@pytest.mark.parametrize(
    "raised",
    [
        UsageError("x"),
        KeyboardInterrupt(),
        SystemExit(),
        OSError(errno.ENOSPC, "full"),
        BrokenPipeError(errno.EPIPE, ""),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity"),
        RuntimeError("[...] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
    ],
)
def test_what_is_no_fault_of_the_file_stays_what_it_is(raised: BaseException) -> None:
    with pytest.raises(type(raised)), refusing("x cannot be loaded", "f", SourceError):
        raise raised
