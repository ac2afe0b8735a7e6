"""Wire format of rows: one message of bytes per row.

A message is the payload (the row and, in FP8, its scales) followed by the metadata (expert numbers, gates).

Letters: X rows, D hidden size, Q tiles of a row, B bytes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from ..fp8 import QuantizedRows, dequantize, quantize, tiles_per_row


class WireFormat(StrEnum):
    """Number format of a row on the wire."""

    NATIVE = "native"  # in the dtype that the model computes in
    BF16 = "bf16"
    FP8 = "fp8"  # E4M3 with 1 × 128 power-of-two scales


@dataclass(frozen=True)
class RowCodec:
    """Encoder and decoder for rows of one width and dtype in one wire format."""

    format: WireFormat
    hidden_size: int
    dtype: torch.dtype
    """dtype of decoded rows."""

    @property
    def payload_bytes_per_row(self) -> int:
        """Payload of one row: its elements and their scales, in bytes."""
        if self.format is WireFormat.FP8:
            return self.hidden_size + tiles_per_row(self.hidden_size)
        return self.hidden_size * self._wire_dtype.itemsize

    @property
    def changes_dtype(self) -> bool:
        """True if encoding or decoding makes a copy in another dtype."""
        return self.format is WireFormat.FP8 or self._wire_dtype != self.dtype

    def encode(self, rows_XD: Tensor) -> Tensor:
        """Encode rows [X, D] to uint8 [X, payload_bytes_per_row]."""
        if self.format is WireFormat.FP8:
            values_XD, exponents_XQ = quantize(rows_XD)
            return pack_columns(values_XD, exponents_XQ)
        return rows_XD.to(self._wire_dtype).contiguous().view(torch.uint8)

    def decode(self, payload_XB: Tensor) -> Tensor:
        """Decode uint8 [X, payload_bytes_per_row] to rows [X, D] in `dtype`."""
        if self.format is WireFormat.FP8:
            values_XD = payload_XB[:, : self.hidden_size].view(torch.float8_e4m3fn)
            return dequantize(values_XD, payload_XB[:, self.hidden_size :].contiguous(), self.dtype)
        return payload_XB.view(self._wire_dtype).to(self.dtype)

    def unpack_quantized(self, messages_XB: Tensor, permute: Callable[[Tensor], Tensor]) -> QuantizedRows:
        """Return the FP8 rows of messages [X, B], reordered by `permute`."""
        values_XD, exponents_XQ = (
            messages_XB[:, : self.hidden_size],
            messages_XB[:, self.hidden_size : self.payload_bytes_per_row],
        )
        return QuantizedRows(permute(values_XD).view(torch.float8_e4m3fn), permute(exponents_XQ))

    def message_columns(self, *metadata: Tensor) -> tuple[tuple[int, torch.dtype], ...]:
        """Return the (width, dtype) of the payload and of each column of `metadata`, for `unpack_columns`."""
        return ((self.payload_bytes_per_row, torch.uint8), *((column.shape[1], column.dtype) for column in metadata))

    @property
    def _wire_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.format is WireFormat.BF16 else self.dtype


def pack_columns(*columns: Tensor) -> Tensor:
    """Concatenate tensors [X, any] of any dtypes as bytes, uint8 [X, B]."""
    # One message per row, because a second all-to-all for the metadata would cost another latency per exchange.
    as_bytes = [column.contiguous().view(torch.uint8) for column in columns if column.shape[1]]
    return as_bytes[0] if len(as_bytes) == 1 else torch.cat(as_bytes, dim=1)


def unpack_columns(message_XB: Tensor, columns: Sequence[tuple[int, torch.dtype]]) -> list[Tensor]:
    """Return the packed tensors, given the width and dtype of each."""
    sizes = [width * dtype.itemsize for width, dtype in columns]
    parts = message_XB.split(sizes, dim=1)
    return [_unpack(part, dtype) for part, (_, dtype) in zip(parts, columns, strict=True)]


def unpack_column(message_XB: Tensor, columns: Sequence[tuple[int, torch.dtype]], index: int) -> Tensor:
    """Return one of the packed tensors."""
    sizes = [width * dtype.itemsize for width, dtype in columns]
    return _unpack(message_XB.split(sizes, dim=1)[index], columns[index][1])


def _unpack(part_XB: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a column in its dtype; a copy unless it is the whole message."""
    # A view in a wider dtype needs an aligned start and stride, which a column of a message need not have.
    rows, size = part_XB.shape
    if part_XB.stride(0) == size:
        return part_XB.view(dtype)
    column = part_XB.new_empty((rows, size // dtype.itemsize), dtype=dtype)
    if size:
        column.view(torch.uint8).copy_(part_XB)
    return column


def empty_metadata(rows: Tensor) -> Tensor:
    """Return metadata of zero columns for each of `rows`."""
    return rows.new_empty((len(rows), 0))
