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

from ..fp8 import QuantizedRows, dequantize, quantize, tiles_per_row


class WireFormat(StrEnum):
    """How the elements of a row cross."""

    NATIVE = "native"  # in the dtype that the model computes in
    BF16 = "bf16"
    FP8 = "fp8"  # E4M3 with 1 × 128 power-of-two scales


@dataclass(frozen=True)
class RowCodec:
    """Rows of one width and dtype in one format."""

    format: WireFormat
    hidden_size: int
    dtype: torch.dtype
    """Of the rows before and after."""

    @property
    def payload_bytes_per_row(self) -> int:
        """Payload of one row: its elements and their scales."""
        if self.format is WireFormat.FP8:
            return self.hidden_size + tiles_per_row(self.hidden_size)
        return self.hidden_size * self._crossing.itemsize

    def encode(self, rows_XD: Tensor) -> Tensor:
        """[X, D] to uint8 [X, row_bytes]."""
        if self.format is WireFormat.FP8:
            values_XD, exponents_XQ = quantize(rows_XD)
            return pack_columns(values_XD, exponents_XQ)
        return rows_XD.to(self._crossing).contiguous().view(torch.uint8)

    def decode(self, payload_XB: Tensor) -> Tensor:
        """uint8 [X, row_bytes] to [X, D] in `dtype`."""
        if self.format is WireFormat.FP8:
            values_XD = payload_XB[:, : self.hidden_size].view(torch.float8_e4m3fn)
            return dequantize(values_XD, payload_XB[:, self.hidden_size :].contiguous(), self.dtype)
        return payload_XB.view(self._crossing).to(self.dtype)

    def unpack_quantized(self, messages_XB: Tensor, permute: Callable[[Tensor], Tensor]) -> QuantizedRows:
        """The rows in FP8 at the beginning of these messages as they came, in the order that `spread` puts them in."""
        values_XD, exponents_XQ = (
            messages_XB[:, : self.hidden_size],
            messages_XB[:, self.hidden_size : self.payload_bytes_per_row],
        )
        return QuantizedRows(permute(values_XD).view(torch.float8_e4m3fn), permute(exponents_XQ))

    def message_columns(self, *beside: Tensor) -> tuple[tuple[int, torch.dtype], ...]:
        """For `unpack_columns`: a payload, and behind it columns like `beside`."""
        return ((self.payload_bytes_per_row, torch.uint8), *((column.shape[1], column.dtype) for column in beside))

    @property
    def _crossing(self) -> torch.dtype:
        return torch.bfloat16 if self.format is WireFormat.BF16 else self.dtype


def pack_columns(*columns: Tensor) -> Tensor:
    """Tensors [X, any] of any dtypes, side by side as uint8 [X, B]."""
    as_bytes = [column.contiguous().view(torch.uint8) for column in columns if column.shape[1]]
    return as_bytes[0] if len(as_bytes) == 1 else torch.cat(as_bytes, dim=1)


def unpack_columns(message_XB: Tensor, columns: Sequence[tuple[int, torch.dtype]]) -> list[Tensor]:
    """The tensors that were packed, given the width and dtype of each."""
    sizes = [width * dtype.itemsize for width, dtype in columns]
    parts = message_XB.split(sizes, dim=1)
    return [_alone(part, dtype) for part, (_, dtype) in zip(parts, columns, strict=True)]


def unpack_column(message_XB: Tensor, columns: Sequence[tuple[int, torch.dtype]], index: int) -> Tensor:
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


def empty_metadata(rows: Tensor) -> Tensor:
    """Zero columns for as many rows: where the payload travels alone."""
    return rows.new_empty((len(rows), 0))
