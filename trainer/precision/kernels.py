"""Triton kernels for Hopper: quantize rows and columns, those of a SwiGLU and of tiles too, and blocks; products, and
gradients of weights (report §3.3).

A tensor core's short accumulator holds 128 products at most: every 128 elements the partial sum is scaled and added to
an FP32 accumulator in registers. One program makes one block of the result. Rows of different experts never share a
block: `first`, `last` and `expert` say for each block of rows which it covers and whose weight it meets.

Every width is right. Where it is no multiple of 16, loads are one number wide, and `grouped_gemm` and `quantize_weight` are
slow besides, since they spill registers; no other kernel does, nor do these two where it is one.

Their twins are in `tiles.py` and `reference.py`. Under `TRITON_INTERPRET=1` they run on a CPU, but for CUDA's exp, in
whose place `tests/trainer/precision/against_twins.py` puts another. Not yet run on hardware.

Letters: R rows, D width, F inner width, N and K sides of a weight.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

TILE: tl.constexpr = tl.constexpr(128)
"""Elements that share a scale, and that a tensor core sums before promotion."""

GROUP_SIZE_M: tl.constexpr = tl.constexpr(16)
"""Blocks of rows that programs take together, see `output_block_index`."""


@triton.jit
def _scale_for(largest, broken, power_of_two: tl.constexpr):
    """FP32 scales, and NaN where `broken`. As `tiles._scale_for`."""
    if power_of_two:
        bits = largest.to(tl.int32, bitcast=True)
        # 448 = 1.75 · 2^8: one more where the mantissa is above 1.75. Down to 2^-126, so that dividing is exact.
        exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
        scale = (tl.maximum(exponent, 1) << 23).to(tl.float32, bitcast=True)
    else:
        scale = tl.maximum(tl.div_rn(largest, 448.0), 1.1754943508222875e-38)
    return tl.where(broken, float("nan"), scale)


@triton.jit
def _broken(x):
    """1 for infinity and NaN."""
    return ((x != x) | (tl.abs(x) == float("inf"))).to(tl.int32)


@triton.jit
def _to_bf16(x):
    """FP32 numbers that BF16 has: the nearest, ties to even. The interpreter's own cast cuts off instead."""
    bits = x.to(tl.int32, bitcast=True)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)  # of some NaN the sum would be a number


@triton.jit
def _store_tiles(x, values_ptr, scales_ptr, row, rows, width, tiles, power_of_two: tl.constexpr, ROWS: tl.constexpr):
    """ROWS tiles of 1 × 128: quantized, to values [R, D] and scales [R, Q]. x [ROWS, 128], row [ROWS]."""
    tile = tl.program_id(1)
    column = tile * TILE + tl.arange(0, TILE)
    scale = _scale_for(tl.max(tl.abs(x), axis=1), tl.max(_broken(x), axis=1) > 0, power_of_two)
    scaled = tl.div_rn(x, tl.broadcast_to(scale[:, None], (ROWS, TILE)))
    place = values_ptr + row[:, None].to(tl.int64) * width + column[None, :]
    tl.store(place, scaled.to(values_ptr.dtype.element_ty), mask=(row[:, None] < rows) & (column[None, :] < width))
    tl.store(scales_ptr + row.to(tl.int64) * tiles + tile, scale, mask=row < rows)


@triton.jit
def _swiglu(gate_up_ptr, gates_ptr, row, column, is_row, width):
    """[R, F] of BF16 [R, 2F], each row times its gate weight where there are any (`gates_ptr` may be None).

    Rounded to BF16 where plain tensors are: after silu, after each product. The exp is that of torch's silu: `tl.exp`
    is off by more where its argument is large.
    """
    there = is_row[:, None] & (column[None, :] < width)
    place = gate_up_ptr + row[:, None].to(tl.int64) * (2 * width) + column[None, :]
    gate = tl.load(place, mask=there, other=0.0).to(tl.float32)
    up = tl.load(place + width, mask=there, other=0.0).to(tl.float32)
    x = _to_bf16(_to_bf16(tl.div_rn(gate, 1 + libdevice.exp(-gate))) * up)
    if gates_ptr is not None:
        x = _to_bf16(x * tl.load(gates_ptr + row, mask=is_row, other=0.0).to(tl.float32)[:, None])
    return x


@triton.jit
def quantize_rowwise(x_ptr, values_ptr, scales_ptr, rows, width, tiles, power_of_two: tl.constexpr, ROWS: tl.constexpr):
    """[R, D] to values [R, D] and scales [R, Q]: 1 × 128 tiles, ROWS of them a program."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    there = (row[:, None] < rows) & (column[None, :] < width)
    place = x_ptr + row[:, None].to(tl.int64) * width + column[None, :]
    x = tl.load(place, mask=there, other=0.0).to(tl.float32)
    _store_tiles(x, values_ptr, scales_ptr, row, rows, width, tiles, power_of_two, ROWS)


@triton.jit
def swiglu_quantize_rowwise(
    gate_up_ptr, gates_ptr, values_ptr, scales_ptr, rows, width, tiles, power_of_two: tl.constexpr, ROWS: tl.constexpr
):
    """`_swiglu` to what `quantize_rowwise` makes of it."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    x = _swiglu(gate_up_ptr, gates_ptr, row, column, row < rows, width)
    _store_tiles(x, values_ptr, scales_ptr, row, rows, width, tiles, power_of_two, ROWS)


@triton.jit
def _store_columns(x, values_ptr, scales_ptr, column, width, tiles, power_of_two: tl.constexpr, COLUMNS: tl.constexpr):
    """COLUMNS tiles of 128 × 1: quantized, to values [D, 128 · Q] and scales [D, Q]. x [128, COLUMNS]."""
    tile = tl.program_id(0)
    scale = _scale_for(tl.max(tl.abs(x), axis=0), tl.max(_broken(x), axis=0) > 0, power_of_two)
    turned = tl.trans(tl.div_rn(x, tl.broadcast_to(scale[None, :], (TILE, COLUMNS))))
    place = column[:, None].to(tl.int64) * (tiles * TILE) + tile * TILE + tl.arange(0, TILE)[None, :]
    tl.store(values_ptr + place, turned.to(values_ptr.dtype.element_ty), mask=column[:, None] < width)
    tl.store(scales_ptr + column.to(tl.int64) * tiles + tile, scale, mask=column < width)


@triton.jit
def quantize_columnwise(
    x_ptr, first_ptr, last_ptr, values_ptr, scales_ptr, width, tiles,
    power_of_two: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """[R, D] to values [D, 128 · Q] and scales [D, Q]: 128 × 1 tiles of the rows from first[q] to last[q]."""
    row = tl.load(first_ptr + tl.program_id(0)) + tl.arange(0, TILE)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = (row[:, None] < tl.load(last_ptr + tl.program_id(0))) & (column[None, :] < width)
    place = x_ptr + row[:, None].to(tl.int64) * width + column[None, :]
    x = tl.load(place, mask=there, other=0.0).to(tl.float32)
    _store_columns(x, values_ptr, scales_ptr, column, width, tiles, power_of_two, COLUMNS)


@triton.jit
def swiglu_quantize_columnwise(
    gate_up_ptr, gates_ptr, first_ptr, last_ptr, values_ptr, scales_ptr, width, tiles,
    power_of_two: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`_swiglu` to what `quantize_columnwise` makes of it."""
    row = tl.load(first_ptr + tl.program_id(0)) + tl.arange(0, TILE)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    x = _swiglu(gate_up_ptr, gates_ptr, row, column, row < tl.load(last_ptr + tl.program_id(0)), width)
    _store_columns(x, values_ptr, scales_ptr, column, width, tiles, power_of_two, COLUMNS)


@triton.jit
def rowwise_to_columnwise(
    x_ptr, x_scales_ptr, first_ptr, last_ptr, values_ptr, scales_ptr, width, tiles,
    power_of_two: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The numbers of 1 × 128 tiles [R, D] to what `quantize_columnwise` makes of them; COLUMNS divides 128."""
    row = tl.load(first_ptr + tl.program_id(0)) + tl.arange(0, TILE)
    is_row = row < tl.load(last_ptr + tl.program_id(0))
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place = x_ptr + row[:, None].to(tl.int64) * width + column[None, :]
    x = tl.load(place, mask=is_row[:, None] & (column[None, :] < width), other=0.0).to(tl.float32)
    scale_at = x_scales_ptr + row.to(tl.int64) * tl.cdiv(width, TILE) + tl.program_id(1) * COLUMNS // TILE
    x *= tl.load(scale_at, mask=is_row, other=0.0)[:, None]
    _store_columns(x, values_ptr, scales_ptr, column, width, tiles, power_of_two, COLUMNS)


@triton.jit
def quantize_weight(
    x_ptr, values_ptr, scales_ptr, rows, width, row_blocks, blocks, power_of_two: tl.constexpr
):  # fmt: skip
    """A stack [L, N, K] to values and scales [L, P, Q]: one 128 × 128 block a program."""
    of_stack, down, across = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = down * TILE + tl.arange(0, TILE)[:, None]
    column = across * TILE + tl.arange(0, TILE)[None, :]
    there = (row < rows) & (column < width)
    place = (of_stack.to(tl.int64) * rows + row) * width + column
    x = tl.load(x_ptr + place, mask=there, other=0.0).to(tl.float32)
    largest = tl.max(tl.max(tl.abs(x), axis=1), axis=0)
    scale = _scale_for(largest, tl.max(tl.max(_broken(x), axis=1), axis=0) > 0, power_of_two)
    scaled = tl.div_rn(x, tl.broadcast_to(scale, (TILE, TILE)))
    tl.store(values_ptr + place, scaled.to(values_ptr.dtype.element_ty), mask=there)
    tl.store(scales_ptr + (of_stack * row_blocks + down) * blocks + across, scale)


@triton.jit
def output_block_index(program, row_blocks, column_blocks):
    """Which block of the result a program makes: row, column.

    Programs that run at the same time shall read little. Those of one wave take a few blocks of columns of GROUP blocks
    of rows, so both factors come from the cache; one after the other down the rows, they would read all rows again for
    each block of columns.
    """
    group = program // (GROUP_SIZE_M * column_blocks)
    height = tl.minimum(row_blocks - group * GROUP_SIZE_M, GROUP_SIZE_M)
    place = program % (GROUP_SIZE_M * column_blocks)
    return group * GROUP_SIZE_M + place % height, place // height


@triton.jit
def grouped_gemm(
    x_ptr, x_scales_ptr, w_ptr, w_scales_ptr, out_ptr, first_ptr, last_ptr, expert_ptr, n, k, n_blocks, k_blocks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x Wᵀ: x [R, K] in 1 × 128 tiles, W [L, N, K] in 128 × 128 blocks, out [R, N]; COLUMNS divides 128."""
    column_blocks = tl.cdiv(n, COLUMNS)
    block, column_block = output_block_index(tl.program_id(0), tl.num_programs(0) // column_blocks, column_blocks)
    row = tl.load(first_ptr + block) + tl.arange(0, ROWS)
    is_row = row < tl.load(last_ptr + block)
    expert = tl.load(expert_ptr + block).to(tl.int64)
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    x_at = x_ptr + row[:, None].to(tl.int64) * k
    w_at = w_ptr + (expert * n + column[None, :]) * k
    x_scale_at = x_scales_ptr + row.to(tl.int64) * k_blocks
    w_scale_at = w_scales_ptr + (expert * n_blocks + column_block * COLUMNS // TILE) * k_blocks
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for tile in range(k_blocks):
        part = tile * TILE + tl.arange(0, TILE)
        x = tl.load(x_at + part[None, :], mask=is_row[:, None] & (part[None, :] < k), other=0.0)
        w = tl.load(w_at + part[:, None], mask=(column[None, :] < n) & (part[:, None] < k), other=0.0)
        x_scale = tl.load(x_scale_at + tile, mask=is_row, other=0.0)
        total += tl.dot(x, w) * x_scale[:, None] * tl.load(w_scale_at + tile)
    place = out_ptr + row[:, None].to(tl.int64) * n + column[None, :]
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & (column[None, :] < n))


@triton.jit
def grouped_wgrad_gemm(
    a_ptr, a_scales_ptr, b_ptr, b_scales_ptr, out_ptr, first_tile_ptr, n, k, tiles,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """a bᵀ over the tiles of each expert, added to what is there: a [N, 128 · Q], b [K, 128 · Q], both in tiles, out
    FP32 [L, N, K].
    """
    expert = tl.program_id(1)
    row_block, column_block = output_block_index(tl.program_id(0), tl.cdiv(n, ROWS), tl.cdiv(k, COLUMNS))
    row = row_block * ROWS + tl.arange(0, ROWS)
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    # Behind the edge the last row is read again: without masks the loop needs fewer registers.
    a_row = tl.minimum(row, n - 1).to(tl.int64)
    b_row = tl.minimum(column, k - 1).to(tl.int64)
    a_at = a_ptr + a_row[:, None] * (tiles * TILE)
    b_at = b_ptr + b_row[None, :] * (tiles * TILE)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for tile in range(tl.load(first_tile_ptr + expert), tl.load(first_tile_ptr + expert + 1)):
        part = tile * TILE + tl.arange(0, TILE)
        partial = tl.dot(tl.load(a_at + part[None, :]), tl.load(b_at + part[:, None]))
        a_scale = tl.load(a_scales_ptr + a_row * tiles + tile)
        b_scale = tl.load(b_scales_ptr + b_row * tiles + tile)
        total += partial * a_scale[:, None] * b_scale[None, :]
    # From the block's corner, in 32 bits: whole places would take registers that are not there.
    corner = out_ptr + (expert.to(tl.int64) * n + row_block * ROWS) * k + column_block * COLUMNS
    place = corner + tl.arange(0, ROWS)[:, None] * k + tl.arange(0, COLUMNS)[None, :]
    there = (row[:, None] < n) & (column[None, :] < k)
    tl.store(place, tl.load(place, mask=there, other=0.0) + total, mask=there)
