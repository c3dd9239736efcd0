"""Sizes in bytes and times, as people write them and as they read them."""

from __future__ import annotations

import re
from fractions import Fraction

from converter.common.errors import UsageError

_BINARY = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")
_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def human_bytes(count: int) -> str:
    """A size in the largest binary unit that leaves at least 1."""
    size, unit = float(count), 0
    while size >= 1024 and unit < len(_BINARY) - 1:
        size, unit = size / 1024, unit + 1
    return f"{count} bytes" if unit == 0 else f"{size:.1f} {_BINARY[unit]}"


def human_time(seconds: float) -> str:
    """A time as one would say it: `40 seconds`, `12 minutes`, `3.5 hours`."""
    if seconds < 90:
        return "1 second" if seconds < 1.5 else f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 90 * 60 else f"{seconds / 3600:.1f} hours"


def parse_bytes(text: str) -> int:
    """Read `4GB`, `2GiB` or a number of bytes.

    Raises:
        UsageError: the text is none of these.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT]?)(iB|B|)", text.strip())
    if match is None or float(match[1]) == 0:
        raise UsageError(
            "the amount of memory cannot be read",
            where="--memory",
            expected="a size such as 4GB or 2GiB",
            got=repr(text),
        )
    number, unit, suffix = match.groups()
    size = _DECIMAL[unit]
    if suffix == "iB":
        size = 1024 ** "_KMGT".index(unit or "_")
    # Exact: in floats 2.01GB would come out a byte short.
    return int(Fraction(number) * size)
