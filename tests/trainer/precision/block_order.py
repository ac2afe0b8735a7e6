"""The block of a result that each program computes. Runs in Triton's interpreter."""

import torch
import triton
import triton.language as tl

from shoestring.trainer.precision import kernels


@triton.jit
def _write(out_ptr, row_blocks, column_blocks):  # type: ignore[no-untyped-def]
    program = tl.program_id(0)
    row, column = kernels.output_block_index(program, row_blocks, column_blocks)
    tl.store(out_ptr + 2 * program, row)
    tl.store(out_ptr + 2 * program + 1, column)


def check_order() -> None:
    """Check that each block comes once, and that consecutive programs read few rows and few columns."""
    for rows, columns in ((1, 5), (16, 3), (35, 4), (5, 1)):
        places = torch.empty((rows * columns, 2), dtype=torch.int32)
        _write[(len(places),)](places, rows, columns)
        assert {tuple(place) for place in places.tolist()} == {(r, c) for r in range(rows) for c in range(columns)}
        for start in range(0, rows, 16):
            height = min(16, rows - start)
            wave = places[start * columns :][: 2 * height]
            assert wave[:, 0].unique().tolist() == list(range(start, start + height))
            assert len(wave[:, 1].unique()) == min(2, columns)
