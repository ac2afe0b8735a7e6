"""Triton kernels for Hopper: row-wise, column-wise and block quantization, GEMMs and weight gradients (report §3.3).

A tensor core's short accumulator sums at most 128 products: every 128 elements the partial sum is scaled and added to
an FP32 accumulator in registers. One program computes one block of the result. A block never has rows of two experts:
`first`, `last` and `expert` give the rows of each block and the expert whose weight multiplies them.

Every width works. If it is not a multiple of 16, loads are one number wide, and `grouped_gemm` and `quantize_weight`
spill registers, which makes them slow; no kernel spills at multiples of 16, and no other kernel at any width.

Their references are in `fp8_tensors.py` and `reference.py`. Under `TRITON_INTERPRET=1` they run on a CPU, except for
CUDA's exp, which `tests/trainer/precision/against_reference.py` replaces. Not yet run on hardware.

Letters: R rows, D width, F inner width, N and K sides of a weight.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

TILE: tl.constexpr = tl.constexpr(128)
"""Elements per scale, and products that a tensor core sums before promotion."""

GROUP_SIZE_M: tl.constexpr = tl.constexpr(16)
"""Row blocks that consecutive programs cover together; see `output_block_index`."""


@triton.jit
def _scale_for(largest, broken, power_of_two: tl.constexpr):
    """Return FP32 scales, NaN where `broken`; the counterpart of `fp8_tensors._scale_for`."""
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
    """Return 1 for infinity and NaN, else 0."""
    return ((x != x) | (tl.abs(x) == float("inf"))).to(tl.int32)


@triton.jit
def _to_bf16(x):
    """Round to BF16, to nearest, ties to even; the result is FP32."""
    # By integers, because the interpreter's cast truncates.
    bits = x.to(tl.int32, bitcast=True)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)  # the sum would turn some NaN into numbers


@triton.jit
def _store_tiles(x, values_ptr, scales_ptr, row, rows, width, tiles, power_of_two: tl.constexpr, ROWS: tl.constexpr):
    """Quantize x [ROWS, 128], one tile per row, and store it to values [R, D] and scales [R, Q] at row [ROWS]."""
    tile = tl.program_id(1)
    column = tile * TILE + tl.arange(0, TILE)
    scale = _scale_for(tl.max(tl.abs(x), axis=1), tl.max(_broken(x), axis=1) > 0, power_of_two)
    scaled = tl.div_rn(x, tl.broadcast_to(scale[:, None], (ROWS, TILE)))
    place = values_ptr + row[:, None].to(tl.int64) * width + column[None, :]
    tl.store(place, scaled.to(values_ptr.dtype.element_ty), mask=(row[:, None] < rows) & (column[None, :] < width))
    tl.store(scales_ptr + row.to(tl.int64) * tiles + tile, scale, mask=row < rows)


@triton.jit
def _swiglu(gate_up_ptr, gates_ptr, row, column, is_row, width):
    """Return SwiGLU [R, F] of BF16 [R, 2F], times the row's gate weight unless `gates_ptr` is None."""
    # Rounded to BF16 as tensor operations are: after silu and after each product. The exp is that of torch's silu,
    # because `tl.exp` has larger errors for large arguments.
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
    """Quantize [R, D] to values [R, D] and scales [R, Q]: 1 × 128 tiles, ROWS of them per program."""
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
    """Quantize `_swiglu` as `quantize_rowwise` does."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    x = _swiglu(gate_up_ptr, gates_ptr, row, column, row < rows, width)
    _store_tiles(x, values_ptr, scales_ptr, row, rows, width, tiles, power_of_two, ROWS)


@triton.jit
def _store_columns(x, values_ptr, scales_ptr, column, width, tiles, power_of_two: tl.constexpr, COLUMNS: tl.constexpr):
    """Quantize x [128, COLUMNS], one tile per column, and store it to values [D, 128 · Q] and scales [D, Q]."""
    tile = tl.program_id(0)
    scale = _scale_for(tl.max(tl.abs(x), axis=0), tl.max(_broken(x), axis=0) > 0, power_of_two)
    transposed = tl.trans(tl.div_rn(x, tl.broadcast_to(scale[None, :], (TILE, COLUMNS))))
    place = column[:, None].to(tl.int64) * (tiles * TILE) + tile * TILE + tl.arange(0, TILE)[None, :]
    tl.store(values_ptr + place, transposed.to(values_ptr.dtype.element_ty), mask=column[:, None] < width)
    tl.store(scales_ptr + column.to(tl.int64) * tiles + tile, scale, mask=column < width)


@triton.jit
def quantize_columnwise(
    x_ptr, first_ptr, last_ptr, values_ptr, scales_ptr, width, tiles,
    power_of_two: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Quantize [R, D] to values [D, 128 · Q] and scales [D, Q]: 128 × 1 tiles of the rows from first[q] to last[q]."""
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
    """Quantize `_swiglu` as `quantize_columnwise` does."""
    row = tl.load(first_ptr + tl.program_id(0)) + tl.arange(0, TILE)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    x = _swiglu(gate_up_ptr, gates_ptr, row, column, row < tl.load(last_ptr + tl.program_id(0)), width)
    _store_columns(x, values_ptr, scales_ptr, column, width, tiles, power_of_two, COLUMNS)


@triton.jit
def rowwise_to_columnwise(
    x_ptr, x_scales_ptr, first_ptr, last_ptr, values_ptr, scales_ptr, width, tiles,
    power_of_two: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Quantize the numbers of 1 × 128 tiles [R, D] as `quantize_columnwise` does; COLUMNS divides 128."""
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
    """Quantize a stack [L, N, K] to values and scales [L, P, Q]: one 128 × 128 block per program."""
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
    """Return row and column of the block that a program computes."""
    # Programs that run together should share operands in the cache. Those of one wave cover a few column blocks of
    # GROUP_SIZE_M row blocks; in plain row order they would read all rows again for each column block.
    group = program // (GROUP_SIZE_M * column_blocks)
    height = tl.minimum(row_blocks - group * GROUP_SIZE_M, GROUP_SIZE_M)
    place = program % (GROUP_SIZE_M * column_blocks)
    return group * GROUP_SIZE_M + place % height, place // height


@triton.jit
def grouped_gemm(
    x_ptr, x_scales_ptr, w_ptr, w_scales_ptr, out_ptr, first_ptr, last_ptr, expert_ptr, n, k, n_blocks, k_blocks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute x Wᵀ: x [R, K] in 1 × 128 tiles, W [L, N, K] in 128 × 128 blocks, out [R, N]; COLUMNS divides 128."""
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
    """Add a bᵀ over the tiles of each expert to out, FP32 [L, N, K]; a [N, 128 · Q] and b [K, 128 · Q] are in tiles."""
    expert = tl.program_id(1)
    row_block, column_block = output_block_index(tl.program_id(0), tl.cdiv(n, ROWS), tl.cdiv(k, COLUMNS))
    row = row_block * ROWS + tl.arange(0, ROWS)
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    # Beyond the edge, rows read the last row again instead of a mask, which would need more registers in the loop.
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
    # 32-bit offsets from the block's corner: 64-bit offsets would not fit in the registers.
    corner = out_ptr + (expert.to(tl.int64) * n + row_block * ROWS) * k + column_block * COLUMNS
    place = corner + tl.arange(0, ROWS)[:, None] * k + tl.arange(0, COLUMNS)[None, :]
    there = (row[:, None] < n) & (column[None, :] < k)
    tl.store(place, tl.load(place, mask=there, other=0.0) + total, mask=there)
