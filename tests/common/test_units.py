"""Sizes in bytes, as they are written and read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.common.errors import UsageError
from converter.common.units import human_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("4GB", 4 * 10**9),
        ("4 GB", 4 * 10**9),
        ("4G", 4 * 10**9),
        ("2GiB", 2 * 1024**3),
        (" 1.5 GiB ", 1536 * 1024**2),
        ("512MiB", 512 * 1024**2),
        ("1KiB", 1024),
        ("0.5KB", 500),
        ("1TB", 10**12),
        ("1TiB", 1024**4),
        ("700B", 700),
    ],
)
def test_a_size_is_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "GB", "-1GB", "4gb", "4XB", "4GBB", "1e3", "0", "0GB", "0.0", "4 G B", "1,5GB", "9" * 16,
     "nan", "inf", "4GB\n5"],
)  # fmt: skip
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="cannot be read") as caught:
        parse_bytes(text)
    assert caught.value.details["where"] == "--memory"


@given(st.integers(1, 2**49))
def test_a_size_that_we_print_can_be_given_back(count: int) -> None:
    text = human_bytes(count).replace(" bytes", "")
    assert parse_bytes(text) == pytest.approx(count, rel=0.06)
