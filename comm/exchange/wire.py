"""How rows look between two ranks: one message of bytes a row, in the format chosen for its direction.

A message is the payload (the row and, in FP8, its scales) followed by what travels beside it (expert numbers, gates).

Letters: X rows, D hidden width, B bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from ..fp8 import RowTiles, dequantize, quantize, tiles_of


class Format(StrEnum):
    """How the elements of a row cross."""

    NATIVE = "native"  # in the dtype that the model computes in
    BF16 = "bf16"
    FP8 = "fp8"  # E4M3 with 1 × 128 power-of-two scales


@dataclass(frozen=True)
class RowFormat:
    """Rows of one width and dtype in one format."""

    format: Format
    width: int
    dtype: torch.dtype
    """Of the rows before and after."""

    @property
    def row_bytes(self) -> int:
        """Payload of one row: its elements and their scales."""
        if self.format is Format.FP8:
            return self.width + tiles_of(self.width)
        return self.width * self._crossing.itemsize

    def encode(self, rows_XD: Tensor) -> Tensor:
        """[X, D] to uint8 [X, row_bytes]."""
        if self.format is Format.FP8:
            values_XD, exponents_XQ = quantize(rows_XD)
            return pack(values_XD, exponents_XQ)
        return rows_XD.to(self._crossing).contiguous().view(torch.uint8)

    def decode(self, payload_XB: Tensor) -> Tensor:
        """uint8 [X, row_bytes] to [X, D] in `dtype`."""
        if self.format is Format.FP8:
            values_XD = payload_XB[:, : self.width].view(torch.float8_e4m3fn)
            return dequantize(values_XD, payload_XB[:, self.width :].contiguous(), self.dtype)
        return payload_XB.view(self._crossing).to(self.dtype)

    def tiles(self, messages_XB: Tensor, spread: Callable[[Tensor], Tensor]) -> RowTiles:
        """The rows in FP8 at the beginning of these messages as they came, in the order that `spread` puts them in."""
        values_XD, exponents_XQ = messages_XB[:, : self.width], messages_XB[:, self.width : self.row_bytes]
        return RowTiles(spread(values_XD).view(torch.float8_e4m3fn), spread(exponents_XQ))

    def columns(self, *beside: Tensor) -> tuple[tuple[int, torch.dtype], ...]:
        """For `unpack`: a payload, and behind it columns like `beside`."""
        return ((self.row_bytes, torch.uint8), *((column.shape[1], column.dtype) for column in beside))

    @property
    def _crossing(self) -> torch.dtype:
        return torch.bfloat16 if self.format is Format.BF16 else self.dtype


def pack(*columns: Tensor) -> Tensor:
    """Tensors [X, any] of any dtypes, side by side as uint8 [X, B]."""
    as_bytes = [column.contiguous().view(torch.uint8) for column in columns if column.shape[1]]
    return as_bytes[0] if len(as_bytes) == 1 else torch.cat(as_bytes, dim=1)


def unpack(message_XB: Tensor, columns: Sequence[tuple[int, torch.dtype]]) -> list[Tensor]:
    """The tensors that were packed, given the width and dtype of each."""
    sizes = [width * dtype.itemsize for width, dtype in columns]
    parts = message_XB.split(sizes, dim=1)
    return [_alone(part, dtype) for part, (_, dtype) in zip(parts, columns, strict=True)]


def unpack_one(message_XB: Tensor, columns: Sequence[tuple[int, torch.dtype]], index: int) -> Tensor:
    """One of the tensors that were packed."""
    sizes = [width * dtype.itemsize for width, dtype in columns]
    return _alone(message_XB.split(sizes, dim=1)[index], columns[index][1])


def _alone(part_XB: Tensor, dtype: torch.dtype) -> Tensor:
    """A column as what it was; a copy unless it is the whole message."""
    rows, size = part_XB.shape
    if part_XB.stride(0) == size:
        return part_XB.view(dtype)
    column = part_XB.new_empty((rows, size // dtype.itemsize), dtype=dtype)
    if size:
        column.view(torch.uint8).copy_(part_XB)
    return column


def nothing_beside(rows: Tensor) -> Tensor:
    """Zero columns for as many rows: where the payload travels alone."""
    return rows.new_empty((len(rows), 0))
