"""The load of experts as a heat map."""

from __future__ import annotations

import base64
import re
import struct
import zlib

from shoestring.launch.report.heat_map import MAX_COLUMNS, heat_map


def pixels(picture: str) -> tuple[list[list[int]], bytes, bytes]:
    """Rows of palette places, the palette and its opacities, out of the PNG inside an image tag."""
    found = re.search(r"base64,([^\"]*)", picture)
    assert found is not None
    data, chunks, place = base64.b64decode(found[1]), dict[bytes, bytes](), 8
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    while place < len(data):
        (length,), kind = struct.unpack_from(">I", data, place), data[place + 4 : place + 8]
        chunks[kind] = data[place + 8 : place + 8 + length]
        assert zlib.crc32(kind + chunks[kind]) == struct.unpack_from(">I", data, place + 8 + length)[0]
        place += 12 + length
    width, height = struct.unpack_from(">II", chunks[b"IHDR"])
    flat = zlib.decompress(chunks[b"IDAT"])
    rows = [list(flat[row * (width + 1) + 1 : (row + 1) * (width + 1)]) for row in range(height)]
    return rows, chunks[b"PLTE"], chunks[b"tRNS"]


def test_a_row_is_an_expert_and_its_shade_the_load() -> None:
    rows, palette, opacity = pixels(heat_map([[10, 10, 10, 10], [0, 5, 10, 65], [10, 20, 40, 10]], "load"))
    shades = [[opacity[place] for place in row] for row in rows]
    assert [row[0] for row in shades] == [0, 0, 0, 0]  # the mean is clear
    assert [row[1] for row in shades] == [255, 255, 128, 223]
    assert shades[0][2] == shades[3][2] == 128  # half the mean, and twice it, half of the way
    assert shades[2][2] == 128
    blue, amber = palette[:3], palette[-3:]
    assert [palette[3 * rows[expert][1] :][:3] for expert in (0, 3)] == [blue, amber]


def test_more_moments_than_columns_are_averaged() -> None:
    rows, _, opacity = pixels(heat_map([[1, 3], [3, 1]] * MAX_COLUMNS, "load"))
    assert len(rows[0]) == MAX_COLUMNS
    assert {opacity[place] for row in rows for place in row} == {0}


def test_a_step_without_tokens_is_clear() -> None:
    rows, _, opacity = pixels(heat_map([[0, 0]], "load"))
    assert {opacity[place] for row in rows for place in row} == {0}
