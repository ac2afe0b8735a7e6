"""Compares every operation of a faster backend with the reference, on any device.

As a module it runs Triton kernels in Triton's interpreter, `quantization` or `products`, with TRITON_INTERPRET=1. The
interpreter's casts to E4M3 and BF16 are wrong, so there quantized numbers are stored in FP32 and cast by torch. Nor
does it know functions of CUDA's library: Triton's own exp takes the place of that one.
"""

import sys
from collections.abc import Iterator
from unittest.mock import patch

import torch
from torch import Tensor

from shoestring.tests.trainer.precision.hard_numbers import numbers
from shoestring.trainer.precision.backend import PrecisionBackend, RowsPerExpert
from shoestring.trainer.precision.fp8_tensors import Fp8Weight, RowwiseFp8Tensor, ScaleFormat
from shoestring.trainer.precision.reference import ReferenceBackend

REFERENCE = ReferenceBackend()
ROWS: RowsPerExpert = (130, 0, 128, 7)
MANY: RowsPerExpert = (*((3,) * 33), 130, 0)  # 35 blocks of rows: two groups of 16 and three
FEW: RowsPerExpert = (7,)
TALL = 2100  # 17 blocks of rows
MARGIN = 4
"""Allowed multiple of the error of a model of Hopper's accumulator, which keeps 13 bits: enough for 11 bits."""


def same(ours: RowwiseFp8Tensor | Fp8Weight, theirs: RowwiseFp8Tensor | Fp8Weight, what: str) -> None:
    """Assert equal scales and values, to the last bit."""
    (values, scales), (expected, expected_scales) = vars(ours).values(), vars(theirs).values()
    assert torch.equal(scales.nan_to_num(-1), expected_scales.nan_to_num(-1)), f"scales of {what}"
    cast = values.to(torch.float8_e4m3fn).float().nan_to_num(-1)
    assert torch.equal(cast, expected.float().nan_to_num(-1)), f"values of {what}"


def error(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest error, relative to the largest number."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def check_quantization(backend: PrecisionBackend, device: torch.device) -> None:
    """Check rows, columns and blocks, with hard numbers, NaN and infinity."""
    for shape in ((5, 128), (21, 129), (257, 300)):
        for dtype in (torch.float32, torch.bfloat16):
            x = numbers(*shape, dtype).to(device)
            faulty = x.clone()
            faulty[1, 3], faulty[2, 4], faulty[-1, 0] = float("nan"), float("inf"), -float("inf")
            for scales in ScaleFormat:
                what = f"{shape} {dtype} {scales}"
                for y in (x, faulty):
                    same(backend.quantize_rowwise(y, scales), REFERENCE.quantize_rowwise(y, scales), f"rows {what}")
                    same(backend.quantize_weight(y, scales), REFERENCE.quantize_weight(y, scales), f"blocks {what}")
                    rows = (3, 0, len(y) - 3)
                    ours, theirs = (
                        backend.quantize_columnwise(y, rows, scales),
                        REFERENCE.quantize_columnwise(y, rows, scales),
                    )
                    assert ours.tiles_per_expert_L == theirs.tiles_per_expert_L
                    same(ours.tiles, theirs.tiles, f"columns {what}")
                    tiles = REFERENCE.quantize_rowwise(y, scales)
                    ours, theirs = (
                        backend.rowwise_to_columnwise(tiles, rows, scales),
                        REFERENCE.rowwise_to_columnwise(tiles, rows, scales),
                    )
                    assert ours.tiles_per_expert_L == theirs.tiles_per_expert_L
                    same(ours.tiles, theirs.tiles, f"columns of tiles {what}")
    stack = torch.randn(3, 140, 200, device=device)
    same(
        backend.quantize_weight(stack, ScaleFormat.FP32),
        REFERENCE.quantize_weight(stack, ScaleFormat.FP32),
        "blocks of a stack",
    )
    assert backend.quantize_columnwise(stack[0][:0], (0, 0), ScaleFormat.FP32).tiles.values_XD.shape == (200, 0)
    assert backend.quantize_rowwise(stack[0][:0], ScaleFormat.FP32).values_XD.shape == (0, 200)


def check_swiglu(backend: PrecisionBackend, device: torch.device) -> None:
    """Check rows with and without gate weights of two dtypes; the gates include every BF16 number, NaN included.

    Every one but the subnormal: Triton's interpreter does not read these for what they are.
    """
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).view(256, 256)
    every = every.masked_fill(every.abs() < torch.finfo(torch.bfloat16).tiny, 0)
    whole = torch.cat((every, torch.ones_like(every)), dim=1)  # so that rounding after silu shows
    inputs = [whole, *(numbers(rows, 2 * width, torch.bfloat16) for rows, width in ((5, 128), (21, 129), (130, 96)))]
    for gate_up in (x.to(device) for x in (*inputs, inputs[1].float(), inputs[1].double(), inputs[1][:0])):
        gates = torch.rand(len(gate_up), device=device)
        gates[::4] = 0
        gates[1:2] = torch.tensor(2**31 - 1, dtype=torch.int32).view(torch.float32)  # NaN, as a GPU writes it
        for weights in (None, gates.to(torch.promote_types(gate_up.dtype, torch.float32)), gates.to(gate_up.dtype)):
            gated = "no gates" if weights is None else str(weights.dtype)
            rows_L = (len(gate_up) // 3, 0, len(gate_up) - len(gate_up) // 3)
            for scales in ScaleFormat:
                what = f"SwiGLU {tuple(gate_up.shape)} {gate_up.dtype} {scales}, {gated}"
                expected = REFERENCE.swiglu_quantize_rowwise(gate_up, weights, scales)
                same(backend.swiglu_quantize_rowwise(gate_up, weights, scales), expected, f"rows of {what}")
                both = [
                    each.swiglu_quantize_columnwise(gate_up, weights, rows_L, scales) for each in (backend, REFERENCE)
                ]
                same(both[0].tiles, both[1].tiles, f"columns of {what}")
                assert both[0].tiles_per_expert_L == both[1].tiles_per_expert_L


def products(backend: PrecisionBackend, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yield all three products, dense and grouped, with sides of no round size; the numbers are equal at each call."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    for rows, n, k in ((5, 40, 30), (130, 256, 300)):
        x, w = (
            REFERENCE.quantize_rowwise(normal(rows, k), ScaleFormat.FP32),
            REFERENCE.quantize_weight(normal(n, k), ScaleFormat.FP32),
        )
        yield f"product {rows} {n} {k}", backend.gemm(x, w, torch.float32)
        grad = REFERENCE.quantize_rowwise(normal(rows, n), ScaleFormat.FP32)
        yield f"input gradient {rows} {n} {k}", backend.gemm(grad, w.transposed(), torch.float32)
    for rows_L in (ROWS, MANY):
        x, w = (
            REFERENCE.quantize_rowwise(normal(sum(rows_L), 140), ScaleFormat.FP32),
            REFERENCE.quantize_weight(normal(len(rows_L), 200, 140), ScaleFormat.FP32),
        )
        yield f"product of {len(rows_L)} experts", backend.grouped_gemm(x, w, rows_L, torch.float32)
    for rows_L, n, k, dtypes in ((ROWS, 200, 140, (torch.float32, torch.float64)), (FEW, TALL, 150, (torch.float32,))):
        both = [REFERENCE.quantize_columnwise(normal(sum(rows_L), width), rows_L, ScaleFormat.FP32) for width in (n, k)]
        for dtype in dtypes:
            sums = normal(len(rows_L), n, k).to(dtype)
            before = sums.clone()
            backend.accumulate_grouped_wgrad(both[0], both[1], sums)
            assert all(torch.equal(sums[i], before[i]) for i, rows in enumerate(rows_L) if not rows)
            yield f"weight gradient {n} {k} added to {dtype}", sums


def check_products(backend: PrecisionBackend, device: torch.device, accumulator: ReferenceBackend = REFERENCE) -> None:
    """Check up to the order of sums in FP32, 1e-5, and `MARGIN` times the error of the sums of `accumulator`."""
    found, exact, modeled = (dict(products(each, device)) for each in (backend, REFERENCE, accumulator))
    for what, ours in found.items():
        assert (ours.shape, ours.dtype) == (exact[what].shape, exact[what].dtype), what
        limit = 1e-5 + MARGIN * error(modeled[what], exact[what])
        assert error(ours, exact[what]) <= limit, f"{what}: {error(ours, exact[what])}, above {limit}"
    x, w = (
        REFERENCE.quantize_rowwise(torch.ones(0, 140, device=device), ScaleFormat.FP32),
        torch.ones(4, 200, 140, device=device),
    )
    empty = backend.grouped_gemm(x, REFERENCE.quantize_weight(w, ScaleFormat.FP32), (0, 0, 0, 0), torch.bfloat16)
    assert empty.shape == (0, 200)


def main() -> None:
    """Run the check that the argument names, in the interpreter."""
    import triton.language as tl

    from shoestring.tests.trainer.precision.block_order import check_order
    from shoestring.trainer.precision import kernels
    from shoestring.trainer.precision.triton_backend import TritonBackend

    torch.manual_seed(0)
    if sys.argv[1] == "products":
        check_products(TritonBackend(), torch.device("cpu"))
    else:
        check_order()
        check_quantization(TritonBackend(torch.float32), torch.device("cpu"))
        with patch.object(kernels, "libdevice", tl):
            check_swiglu(TritonBackend(torch.float32), torch.device("cpu"))
    print("every kernel equals the reference")


if __name__ == "__main__":
    main()
