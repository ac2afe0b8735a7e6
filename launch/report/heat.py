"""The load of experts as a heat map: a pixel an expert and step, blue below the mean, amber above, clear at it.

A PNG inside the page: a frontier model has fifteen thousand experts, too many for a box each.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence

from markupsafe import Markup

_OCTAVES = 2
"""From a quarter of the mean to four times."""
_SHADES = 16
"""From clear to full, to either side."""
_BELOW, _ABOVE = (58, 110, 176), (224, 138, 30)
MOST_COLUMNS = 240


def heat_map(columns: Sequence[Sequence[float]], label: str) -> Markup:
    """`columns` hold the load of each expert at one moment; those that do not fit in are averaged."""
    kept = _averaged(columns)
    levels = [[_level(load, sum(column) / len(column)) for load in column] for column in kept]
    image = base64.b64encode(_png([bytes(row) for row in zip(*levels, strict=True)])).decode()
    return Markup('<img class="heat" alt="{}" src="data:image/png;base64,{}">').format(label, image)


def _averaged(columns: Sequence[Sequence[float]]) -> list[list[float]]:
    size = -(-len(columns) // MOST_COLUMNS)
    groups = (columns[start : start + size] for start in range(0, len(columns), size))
    return [[sum(loads) / len(loads) for loads in zip(*group, strict=True)] for group in groups]


def _level(load: float, mean: float) -> int:
    """The place of a load in the palette, whose middle is the mean."""
    if load <= 0 or mean <= 0:
        return 0 if mean > 0 else _SHADES
    octaves = min(max(math.log2(load / mean), -_OCTAVES), _OCTAVES)
    return _SHADES + round(octaves / _OCTAVES * _SHADES)


def _palette() -> list[tuple[int, int, int, int]]:
    """Red, green, blue and opacity, so that it suits a light and a dark page."""
    strength = [round(255 * step / _SHADES) for step in range(_SHADES + 1)]
    return [(*_BELOW, s) for s in reversed(strength[1:])] + [(*_ABOVE, s) for s in strength]


def _png(rows: Sequence[bytes]) -> bytes:
    """An image of the palette's colours, by the PNG specification: each row of pixels behind a 0, for no filter."""
    palette = _palette()
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)
    chunks = (
        (b"IHDR", header),
        (b"PLTE", bytes(channel for colour in palette for channel in colour[:3])),
        (b"tRNS", bytes(colour[3] for colour in palette)),
        (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows), 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
