"""The plan as a picture: a small PNG made from numbers, with nothing but the standard library.

One column for each layer: dark for full attention, light for a sliding window. Where layers were
scored, a bar stands over each, as high as its score.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

from converter.files import output_errors
from converter.mask import FULL
from converter.plan import Plan

_WIDEST_COLUMN, _WIDEST_PICTURE = 24, 960
_STRIP_HEIGHT, _BARS_HEIGHT, _GAP = 28, 72, 2
_WHITE, _FULL, _SLIDING, _BAR, _SLIDING_BAR = (
    (255, 255, 255),
    (31, 78, 121),
    (189, 215, 238),
    (31, 78, 121),
    (120, 160, 200),
)
_SIGNATURE = b"\x89PNG\r\n\x1a\n"

Colour = tuple[int, int, int]


def plan_picture(plan: Plan, scores: Sequence[float] | None) -> bytes:
    """The picture as the bytes of a PNG file.

    Args:
        plan: which layers slide.
        scores: one number a layer, or None when nothing was measured; negative ones have no bar.
    """
    layers = len(plan.layer_types)
    column = max(_GAP + 1, min(_WIDEST_COLUMN, _WIDEST_PICTURE // layers))
    highest = max(scores, default=0.0) if scores is not None else 0.0
    bars = _BARS_HEIGHT if highest > 0 else 0
    heights = [
        round(max(score, 0.0) / highest * (bars - 4)) if bars else 0
        for score in (scores if scores is not None else [0.0] * layers)
    ]
    rows = [
        _row(
            column,
            [
                _bar_colour(kind) if bars - y <= height else _WHITE
                for kind, height in zip(plan.layer_types, heights, strict=True)
            ],
        )
        for y in range(bars)
    ]
    strip = _row(column, [_FULL if kind == FULL else _SLIDING for kind in plan.layer_types])
    return _png(rows + [strip] * _STRIP_HEIGHT)


def write_picture(path: Path, plan: Plan, scores: Sequence[float] | None) -> None:
    """Write the picture into a checkpoint that is being built.

    Raises:
        OutputError: the disk is full or may not be written to.
    """
    with output_errors(path):
        path.write_bytes(plan_picture(plan, scores))


def _bar_colour(kind: str) -> Colour:
    return _BAR if kind == FULL else _SLIDING_BAR


def _row(column: int, colours: Sequence[Colour]) -> bytes:
    """One line of pixels: a column of colour and a gap for each layer."""
    return b"".join(bytes(colour) * (column - _GAP) + bytes(_WHITE) * _GAP for colour in colours)


def _png(rows: Sequence[bytes]) -> bytes:
    """An RGB image of 8 bits a channel (PNG specification, W3C, third edition)."""
    width, height = len(rows[0]) // 3, len(rows)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows), 9)
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
