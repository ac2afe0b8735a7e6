"""FP8 GEMMs by Triton kernels. Not yet run on hardware: the interpreter runs them, and the compiler compiles them.

Letters: X rows, D width, R rows of activations, F inner width, L experts on this rank; N, K sides of a weight, Q tiles
of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from ...comm.fp8 import TILE_WIDTH, tiles_per_row
from ...comm.host_transfer import to_device
from ...comm.units import ceil_div
from . import kernels
from .backend import PrecisionBackend, RowsPerExpert
from .fp8_tensors import ColumnwiseFp8Tensor, Fp8Weight, RowwiseFp8Tensor, ScaleFormat, gemm_output_dtype

_ROWS_TO_QUANTIZE, _COLUMNS_TO_QUANTIZE = 16, 64
_ROWS, _COLUMNS = 128, 128  # of an output block of a GEMM

KernelInputs = tuple[Tensor] | tuple[Tensor, Tensor | None]
"""Inputs of a quantizing kernel: rows; FP8 rows and scales; or gate and up projections with gate weights or None."""


@dataclass(frozen=True)
class TritonBackend(PrecisionBackend):
    """FP8 backend by Triton kernels."""

    # Tests under Triton's interpreter store another dtype, because the interpreter's cast to E4M3 is wrong.
    value_dtype: torch.dtype = torch.float8_e4m3fn
    """Dtype in which quantized numbers are stored."""

    @override
    def quantize_rowwise(self, x_XD: Tensor, scales: ScaleFormat) -> RowwiseFp8Tensor:
        x_XD = _narrow(x_XD).contiguous()
        return self._rows(kernels.quantize_rowwise, (x_XD,), x_XD.shape[1], scales)

    @override
    def swiglu_quantize_rowwise(
        self, gate_up_RF: Tensor, gates_R: Tensor | None, scales: ScaleFormat
    ) -> RowwiseFp8Tensor:
        # One kernel in BF16, the compute dtype of GPUs.
        if gate_up_RF.dtype != torch.bfloat16:
            return super().swiglu_quantize_rowwise(gate_up_RF, gates_R, scales)
        inputs = _contiguous(gate_up_RF, gates_R)
        return self._rows(kernels.swiglu_quantize_rowwise, inputs, gate_up_RF.shape[1] // 2, scales)

    @override
    def quantize_columnwise(self, x_RD: Tensor, rows_L: RowsPerExpert, scales: ScaleFormat) -> ColumnwiseFp8Tensor:
        x_RD = _narrow(x_RD).contiguous()
        return self._columns(kernels.quantize_columnwise, (x_RD,), x_RD.shape[1], rows_L, scales)

    @override
    def rowwise_to_columnwise(
        self, x: RowwiseFp8Tensor, rows_L: RowsPerExpert, scales: ScaleFormat
    ) -> ColumnwiseFp8Tensor:
        return self._columns(
            kernels.rowwise_to_columnwise, (x.values_XD, x.scales_XQ), x.values_XD.shape[1], rows_L, scales
        )

    @override
    def swiglu_quantize_columnwise(
        self, gate_up_RF: Tensor, gates_R: Tensor | None, rows_L: RowsPerExpert, scales: ScaleFormat
    ) -> ColumnwiseFp8Tensor:
        # One kernel in BF16, the compute dtype of GPUs.
        if gate_up_RF.dtype != torch.bfloat16:
            return super().swiglu_quantize_columnwise(gate_up_RF, gates_R, rows_L, scales)
        inputs = _contiguous(gate_up_RF, gates_R)
        return self._columns(kernels.swiglu_quantize_columnwise, inputs, gate_up_RF.shape[1] // 2, rows_L, scales)

    @override
    def quantize_weight(self, weight: Tensor, scales: ScaleFormat) -> Fp8Weight:
        weight_LNK = _narrow(weight).contiguous().view(-1, *weight.shape[-2:])
        count, rows, columns = weight_LNK.shape
        sides = (tiles_per_row(rows), tiles_per_row(columns))
        values = torch.empty(weight.shape, dtype=self.value_dtype, device=weight.device)
        block_scales = torch.empty((*weight.shape[:-2], *sides), dtype=torch.float32, device=weight.device)
        kernels.quantize_weight[(count, *sides)](
            weight_LNK, values, block_scales, rows, columns, *sides, scales is ScaleFormat.POWER_OF_TWO, num_warps=8
        )
        return Fp8Weight(values, block_scales)

    @override
    def gemm(self, x: RowwiseFp8Tensor, weight: Fp8Weight, dtype: torch.dtype) -> Tensor:
        stack = Fp8Weight(weight.values_NK[None], weight.scales_PQ[None])
        return self.grouped_gemm(x, stack, (len(x.values_XD),), dtype)

    @override
    def grouped_gemm(self, x: RowwiseFp8Tensor, weight: Fp8Weight, rows_L: RowsPerExpert, dtype: torch.dtype) -> Tensor:
        weight = weight.contiguous()  # tensor cores read E4M3 only along K, so a transposed weight is copied
        _, columns, k = weight.values_NK.shape
        out_RN = x.values_XD.new_empty((len(x.values_XD), columns), dtype=gemm_output_dtype(dtype))
        spans = _spans(rows_L, _ROWS)
        if spans:
            first, last, expert = index_tensors(out_RN.device, zip(*spans, strict=True))
            kernels.grouped_gemm[(len(spans) * ceil_div(columns, _COLUMNS),)](
                x.values_XD, x.scales_XQ, weight.values_NK, weight.scales_PQ, out_RN, first, last, expert,
                columns, k, tiles_per_row(columns), tiles_per_row(k), _ROWS, _COLUMNS, num_warps=8, num_stages=3,
            )  # fmt: skip
        return out_RN.to(dtype)

    @override
    def grouped_wgrad_gemm(self, grad: ColumnwiseFp8Tensor, x: ColumnwiseFp8Tensor) -> Tensor:
        shape = len(grad.tiles_per_expert_L), len(grad.tiles.values_XD), len(x.tiles.values_XD)
        out_LNK = grad.tiles.scales_XQ.new_zeros(shape)
        self.accumulate_grouped_wgrad(grad, x, out_LNK)
        return out_LNK

    @override
    def accumulate_grouped_wgrad(self, grad: ColumnwiseFp8Tensor, x: ColumnwiseFp8Tensor, sum_LNK: Tensor) -> None:
        # One kernel that writes only the sum.
        if sum_LNK.dtype != torch.float32 or not sum_LNK.is_contiguous():
            sum_LNK += self.grouped_wgrad_gemm(grad, x)
            return
        (experts, rows, columns), a, b = sum_LNK.shape, grad.tiles, x.tiles
        (first,) = index_tensors(sum_LNK.device, [list(accumulate(grad.tiles_per_expert_L, initial=0))])
        kernels.grouped_wgrad_gemm[(ceil_div(rows, _ROWS) * ceil_div(columns, _COLUMNS), experts)](
            a.values_XD, a.scales_XQ, b.values_XD, b.scales_XQ, sum_LNK, first,
            rows, columns, a.scales_XQ.shape[1], _ROWS, _COLUMNS, num_warps=8, num_stages=3,
        )  # fmt: skip

    def _rows(self, kernel: Any, inputs: KernelInputs, width: int, scales: ScaleFormat) -> RowwiseFp8Tensor:
        rows = len(inputs[0])
        tiles = self._empty_rows(inputs[0], rows, width)
        if rows:
            kernel[(ceil_div(rows, _ROWS_TO_QUANTIZE), tiles_per_row(width))](
                *inputs, tiles.values_XD, tiles.scales_XQ, rows, width, tiles_per_row(width),
                scales is ScaleFormat.POWER_OF_TWO, _ROWS_TO_QUANTIZE, num_warps=4,
            )  # fmt: skip
        return tiles

    def _columns(
        self, kernel: Any, inputs: KernelInputs, width: int, rows_L: RowsPerExpert, scales: ScaleFormat
    ) -> ColumnwiseFp8Tensor:
        like, spans = inputs[0], _spans(rows_L, TILE_WIDTH)
        tiles = self._empty_rows(like, width, len(spans) * TILE_WIDTH)
        if spans:
            first, last, _ = index_tensors(like.device, zip(*spans, strict=True))
            kernel[(len(spans), ceil_div(width, _COLUMNS_TO_QUANTIZE))](
                *inputs, first, last, tiles.values_XD, tiles.scales_XQ, width, len(spans),
                scales is ScaleFormat.POWER_OF_TWO, _COLUMNS_TO_QUANTIZE, num_warps=8,
            )  # fmt: skip
        return ColumnwiseFp8Tensor(tiles, tuple(map(tiles_per_row, rows_L)))

    def _empty_rows(self, like: Tensor, rows: int, width: int) -> RowwiseFp8Tensor:
        return RowwiseFp8Tensor(
            torch.empty((rows, width), dtype=self.value_dtype, device=like.device),
            torch.empty((rows, tiles_per_row(width)), dtype=torch.float32, device=like.device),
        )


def _contiguous(gate_up_RF: Tensor, gates_R: Tensor | None) -> KernelInputs:
    return gate_up_RF.contiguous(), None if gates_R is None else gates_R.contiguous()


def _narrow(x: Tensor) -> Tensor:
    """Cast to a dtype that the kernels read: BF16 or FP32."""
    return x if x.dtype == torch.bfloat16 else x.to(torch.float32)


def _spans(rows_L: Sequence[int], size: int) -> list[tuple[int, int, int]]:
    """Split rows into blocks of up to `size` that do not cross experts: (first row, end, expert)."""
    ends = accumulate(rows_L)
    return [
        (start, end, expert)
        for expert, (rows, end) in enumerate(zip(rows_L, ends, strict=True))
        for start in range(end - rows, end, size)
    ]


def index_tensors(device: torch.device, numbers: object) -> list[Tensor]:
    """Copy lists of integers to the device, without waiting for it."""
    return list(to_device(torch.tensor(list(numbers), dtype=torch.int32), device).unbind())  # type: ignore[call-overload]
