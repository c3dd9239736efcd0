"""The plan's picture, read back by an independent decoder of a few lines."""

from __future__ import annotations

import struct
import zlib

import pytest

from converter.mask import FULL, Mask
from converter.picture import plan_picture
from converter.plan import Plan, layer_types_of

Pixel = tuple[int, int, int]
DARK, LIGHT, WHITE = (31, 78, 121), (189, 215, 238), (255, 255, 255)


def plan_of(total: int, *full: int) -> Plan:
    return Plan(layer_types_of(full, total), Mask(16), "m", None, None, "s", None)


def pixels(png: bytes) -> list[list[Pixel]]:
    """Rows of an RGB image whose rows are not filtered; every checksum is checked."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(png):
        (size,), kind = struct.unpack(">I", png[at : at + 4]), png[at + 4 : at + 8]
        data = png[at + 8 : at + 8 + size]
        assert struct.unpack(">I", png[at + 8 + size : at + 12 + size])[0] == zlib.crc32(
            kind + data
        )
        chunks[kind] = data
        at += 12 + size
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert rest == [8, 2, 0, 0, 0]
    raw, line = zlib.decompress(chunks[b"IDAT"]), 1 + 3 * width
    assert len(raw) == height * line
    rows = [raw[y * line + 1 : (y + 1) * line] for y in range(height)]
    assert all(raw[y * line] == 0 for y in range(height))
    return [[tuple(row[3 * x : 3 * x + 3]) for x in range(width)] for row in rows]  # type: ignore[misc]


@pytest.mark.parametrize(("total", "full"), [(1, ()), (8, (2, 5)), (64, (0, 63)), (500, (7,))])
def test_the_strip_shows_which_layers_slide(total: int, full: tuple[int, ...]) -> None:
    plan = plan_of(total, *full)
    strip = pixels(plan_picture(plan, None))[-1]
    column = len(strip) // total
    assert len(strip) == column * total
    shown = [strip[layer * column] for layer in range(total)]
    assert shown == [DARK if kind == FULL else LIGHT for kind in plan.layer_types]
    assert {strip[layer * column + column - 1] for layer in range(total)} == {WHITE}


def test_bars_are_as_high_as_scores() -> None:
    scores = [-1.0, 0.0, 1.0, 2.0, 4.0]
    image = pixels(plan_picture(plan_of(5, 4), scores))
    column = len(image[0]) // 5
    heights = [sum(row[layer * column] != WHITE for row in image) - 28 for layer in range(5)]
    assert heights == [0, 0, 17, 34, 68]


@pytest.mark.parametrize("scores", [None, [0.0] * 4, [-1.0] * 4])
def test_without_a_score_above_zero_there_are_no_bars(scores: list[float] | None) -> None:
    assert len(pixels(plan_picture(plan_of(4, 1), scores))) == 28


def test_a_picture_is_small_and_the_same_every_time() -> None:
    plan = plan_of(48, *range(0, 48, 4))
    first = plan_picture(plan, [0.1 * layer for layer in range(48)])
    assert first == plan_picture(plan, [0.1 * layer for layer in range(48)])
    assert len(first) < 4000
