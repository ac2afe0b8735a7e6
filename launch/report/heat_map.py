"""Heat map of expert load: one pixel per expert and step, blue below the mean, amber above, transparent at it.

It is an embedded PNG, since DeepSeek-V3's 15 thousand routed experts are too many for one SVG box each. Letters: N
steps, E experts.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from ...comm.units import ceil_div

_OCTAVES = 2
"""Range of colors: from a quarter of the mean to four times the mean."""
_SHADES = 16
"""Shades on each side of the mean."""
_BELOW, _ABOVE = (58, 110, 176), (224, 138, 30)
MAX_COLUMNS = 240


def heat_map(loads: Sequence[Sequence[float]], label: str) -> Markup:
    """Draw `loads`, one sequence of expert loads per step; neighboring steps are averaged if there are too many."""
    rows = _shades(_averaged(np.array(loads, dtype=np.float64))).T
    image = base64.b64encode(_png(rows)).decode()
    return Markup('<img class="heat" alt="{}" src="data:image/png;base64,{}">').format(label, image)


def _averaged(loads_NE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of each stretch of neighboring steps."""
    starts = np.arange(0, len(loads_NE), ceil_div(len(loads_NE), MAX_COLUMNS))
    counts = np.diff(np.append(starts, len(loads_NE)))
    means: NDArray[np.float64] = np.add.reduceat(loads_NE, starts, axis=0) / counts[:, None]
    return means


def _shades(loads_NE: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return palette indices; the middle is the mean load of a step, also for a step without load."""
    mean_N1 = loads_NE.mean(axis=1, keepdims=True)
    ratios_NE = np.where(mean_N1 > 0, loads_NE / np.where(mean_N1 > 0, mean_N1, 1), 1)
    octaves_NE = np.log2(np.clip(ratios_NE, 2.0**-_OCTAVES, 2.0**_OCTAVES))
    places_NE: NDArray[np.uint8] = (_SHADES + np.rint(octaves_NE / _OCTAVES * _SHADES)).astype(np.uint8)
    return places_NE


def _palette() -> list[tuple[int, int, int, int]]:
    """Return (red, green, blue, opacity) colors; opacity makes them fit light and dark pages."""
    strength = [round(255 * step / _SHADES) for step in range(_SHADES + 1)]
    return [(*_BELOW, s) for s in reversed(strength[1:])] + [(*_ABOVE, s) for s in strength]


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode palette indices as PNG. Each row of pixels follows a 0, the filter type `none`."""
    palette, (height, width) = _palette(), pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    chunks = (
        (b"IHDR", header),
        (b"PLTE", bytes(channel for color in palette for channel in color[:3])),
        (b"tRNS", bytes(color[3] for color in palette)),
        (b"IDAT", zlib.compress(np.insert(pixels, 0, 0, axis=1).tobytes())),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
