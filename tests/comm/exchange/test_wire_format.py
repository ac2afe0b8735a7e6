"""Messages between ranks: tensors in, bytes out and back."""

import pytest
import torch

from shoestring.comm.exchange.wire_format import RowCodec, WireFormat, empty_metadata, pack_columns, unpack_columns


@pytest.mark.parametrize("rows", [0, 1, 4])
def test_a_message_is_taken_apart_as_it_was_put_together(rows: int) -> None:
    numbers, nothing = torch.randint(9, (rows, 1), dtype=torch.int16), empty_metadata(torch.ones(rows))
    columns = (torch.randn(rows, 3), numbers, nothing, torch.randn(rows, 2, dtype=torch.float64))
    message = pack_columns(*columns)
    assert message.shape == (rows, 12 + 2 + 0 + 16)
    parts = unpack_columns(message, [(column.shape[1], column.dtype) for column in columns])
    assert all(torch.equal(part, column) for part, column in zip(parts, columns, strict=True))


@pytest.mark.parametrize(
    ("form", "dtype", "size"),
    [
        (WireFormat.NATIVE, torch.float64, 8 * 130),
        (WireFormat.NATIVE, torch.bfloat16, 2 * 130),
        (WireFormat.BF16, torch.float32, 2 * 130),
        (WireFormat.FP8, torch.bfloat16, 130 + 2),
    ],
)
def test_rows_cross_in_their_format(form: WireFormat, dtype: torch.dtype, size: int) -> None:
    wire = RowCodec(form, 130, dtype)
    rows_XD = torch.randint(-8, 9, (5, 130)).to(dtype)  # exact in every format
    encoded = wire.encode(rows_XD)
    assert encoded.dtype == torch.uint8
    assert encoded.shape == (5, size)
    assert wire.payload_bytes_per_row == size
    assert torch.equal(wire.decode(encoded), rows_XD)
