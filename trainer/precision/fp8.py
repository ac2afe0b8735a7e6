"""Linear in FP8: its three products, what it keeps for its backward, gradients of weights apart (report §3.3).

    forward          y  = x Wᵀ     x in 1 × 128 tiles, W in 128 × 128 blocks
    input gradient   dx = dy W     dy in 1 × 128 tiles, the same blocks, transposed
    weight gradient  dW = dyᵀ x    both in 128 × 1 tiles, the sum in FP32, added to the FP32 gradient

What is kept of x is FP8: its tiles, which the backward turns into columns; E5M6 for the Linear after attention; and
where x is the output of a SwiGLU, the tiles of that one's input, from which x is computed again. Nothing is kept of
an x that the backward makes again anyway (`recompute`), but for the one after attention.

Letters: R rows, L experts on this rank; N and K widths, F inner width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...parallelism.weight_grad import accumulate_grad, get_active_collector
from ..model.recompute import will_be_recomputed
from .attention_output import SharedAttentionOutput
from .backend import PrecisionBackend, RowsPerExpert
from .e5m6 import E5M6Rows, pack_e5m6, unpack_e5m6
from .fp8_tensors import ColumnwiseFp8Tensor, Fp8Weight, RowwiseFp8Tensor, ScaleFormat, dequantize_rowwise
from .swiglu import swiglu_backward
from .weight_cache import Fp8WeightCache


@dataclass(frozen=True)
class Fp8LinearOps:
    """How the Linears of one model compute."""

    backend: PrecisionBackend
    scale_format: ScaleFormat = ScaleFormat.FP32
    """Of all but those which the report wants to be powers of two: the input of the Linear after attention, the rows
    that experts receive, and the gradients that they receive. The last two are what crosses between ranks in FP8: rows
    that came in FP8 are taken as they came, and tiles made of such gradients hold the numbers that came."""
    weight_cache: Fp8WeightCache = field(default_factory=Fp8WeightCache)

    def linear(
        self,
        x: Tensor,
        weight_NK: Tensor,
        *,
        after_attention: bool = False,
        attention_output: SharedAttentionOutput | None = None,
    ) -> Tensor:
        """x Wᵀ, [..., K] to [..., N], in the dtype of `x`. `shared`: the attention whose output `x` is."""
        x_RK = x.flatten(0, -2)
        scales = ScaleFormat.POWER_OF_TWO if after_attention else self.scale_format
        if torch.is_grad_enabled():
            out: Tensor = _Linear.apply(x_RK, weight_NK, self, None, scales, after_attention, attention_output, None)  # type: ignore[no-untyped-call]
        else:
            out = self._product(self.backend.quantize_rowwise(x_RK, scales), weight_NK, None, x_RK.dtype)
        return out.view(*x.shape[:-1], len(weight_NK))

    def swiglu_linear(self, gate_up: Tensor, weight_NK: Tensor) -> Tensor:
        """SwiGLU(gate_up) Wᵀ, [..., 2F] to [..., N], keeping tiles of `gate_up` alone."""
        out = self._of_swiglu(gate_up.flatten(0, -2), None, weight_NK, None)
        return out.view(*gate_up.shape[:-1], len(weight_NK))

    def quantize_received_rows(self, rows_RK: Tensor) -> RowwiseFp8Tensor:
        """Received rows as they would have come on an FP8 wire."""
        return self.backend.quantize_rowwise(rows_RK, ScaleFormat.POWER_OF_TWO)

    def experts_gate_up(
        self, rows_RK: Tensor, weight_LNK: Tensor, rows_L: RowsPerExpert, prequantized: RowwiseFp8Tensor | None = None
    ) -> Tensor:
        """Each received row times the transposed weight of its expert, [R, N]; `came`: the rows where they came in FP8.

        Then of `rows_RK` nothing but shape and dtype is used.
        """
        if not torch.is_grad_enabled():
            tiles = self.quantize_received_rows(rows_RK) if prequantized is None else prequantized
            return self._product(tiles, weight_LNK, rows_L, rows_RK.dtype)
        scales = ScaleFormat.POWER_OF_TWO
        out: Tensor = _Linear.apply(rows_RK, weight_LNK, self, rows_L, scales, False, None, prequantized)  # type: ignore[no-untyped-call]
        return out

    def experts_swiglu_down(
        self, gate_up_RF: Tensor, gates_R: Tensor, weight_LNK: Tensor, rows_L: RowsPerExpert
    ) -> Tensor:
        """SwiGLU(gate_up) times the row's gate weight, times the transposed weight of its expert, [R, N]."""
        return self._of_swiglu(gate_up_RF, gates_R, weight_LNK, rows_L)

    def _of_swiglu(
        self, gate_up_RF: Tensor, gates_R: Tensor | None, weight: Tensor, rows_L: RowsPerExpert | None
    ) -> Tensor:
        if not torch.is_grad_enabled():
            x = self.backend.swiglu_quantize_rowwise(gate_up_RF, gates_R, self.scale_format)
            return self._product(x, weight, rows_L, gate_up_RF.dtype)
        out: Tensor = _LinearOfSwiGLU.apply(gate_up_RF, gates_R, weight, self, rows_L)  # type: ignore[no-untyped-call]
        return out

    def _product(self, x: RowwiseFp8Tensor, weight: Tensor, rows_L: RowsPerExpert | None, dtype: torch.dtype) -> Tensor:
        """x Wᵀ with nothing kept."""
        return self.gemm(x, self.quantized_weight(weight), rows_L, dtype)

    def gemm(self, x: RowwiseFp8Tensor, blocks: Fp8Weight, rows_L: RowsPerExpert | None, dtype: torch.dtype) -> Tensor:
        """x Wᵀ of one weight, or of each row's expert."""
        if rows_L is None:
            return self.backend.gemm(x, blocks, dtype)
        return self.backend.grouped_gemm(x, blocks, rows_L, dtype)

    def quantized_weight(self, weight: Tensor) -> Fp8Weight:
        """Of a weight, once a step."""
        return self.weight_cache.get_or_quantize(weight, lambda w: self.backend.quantize_weight(w, self.scale_format))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RK: Tensor,
        weight: Tensor,
        fp8: Fp8LinearOps,
        rows_L: RowsPerExpert | None,
        scales: ScaleFormat,
        after_attention: bool,
        shared: SharedAttentionOutput | None,
        came: RowwiseFp8Tensor | None,
    ) -> Tensor:
        x = fp8.backend.quantize_rowwise(x_RK, scales) if came is None else came
        blocks = fp8.quantized_weight(weight)
        ctx.fp8, ctx.weight, ctx.rows, ctx.left, ctx.x_scales = fp8, weight, rows_L, get_active_collector(), scales
        ctx.packed_width = None
        kept: tuple[Tensor, ...]
        if after_attention:
            packed = pack_e5m6(x_RK)
            ctx.packed_width, kept = packed.width, (packed.bytes_XB, packed.exponents_XQ)
            if shared is not None:
                shared.replace_with_e5m6(packed)
        elif will_be_recomputed(x_RK):
            kept = (x_RK,)
        else:
            kept = (x.values_XD, x.scales_XQ)
        ctx.save_for_backward(blocks.values_NK, blocks.scales_PQ, *kept)
        return fp8.gemm(x, blocks, rows_L, x_RK.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, block_scales, *kept = ctx.saved_tensors
        grad_RN, fp8, width, scales = grads[0], ctx.fp8, ctx.packed_width, ctx.x_scales
        rows_L = ctx.rows or (len(grad_RN),)

        def columns(tiles: RowwiseFp8Tensor) -> ColumnwiseFp8Tensor:
            made: ColumnwiseFp8Tensor = fp8.backend.rowwise_to_columnwise(tiles, rows_L, scales)
            return made

        def x() -> ColumnwiseFp8Tensor:
            if width is None:
                return columns(RowwiseFp8Tensor(kept[0], kept[1]))
            wide_RK = unpack_e5m6(E5M6Rows(kept[0], kept[1], width), torch.float32)
            made: ColumnwiseFp8Tensor = fp8.backend.quantize_columnwise(wide_RK, rows_L, scales)
            return made

        if len(kept) == 1:  # wide: what waits for its product shall be FP8
            made = columns(fp8.backend.quantize_rowwise(kept[0], scales))
            grad_weight = _leave(ctx, fp8.backend.quantize_columnwise(grad_RN, rows_L, fp8.scale_format), lambda: made)
        else:
            grad_weight = _leave(ctx, fp8.backend.quantize_columnwise(grad_RN, rows_L, fp8.scale_format), x)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None, None, None, None, None, None
        grad_tiles = fp8.backend.quantize_rowwise(grad_RN, fp8.scale_format)
        turned = fp8.weight_cache.get_transposed(ctx.weight, Fp8Weight(values, block_scales))
        grad_x_RK = fp8.gemm(grad_tiles, turned, ctx.rows, grad_RN.dtype)
        return grad_x_RK, grad_weight, None, None, None, None, None, None


class _LinearOfSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate_up_RF: Tensor,
        gates_R: Tensor | None,
        weight: Tensor,
        fp8: Fp8LinearOps,
        rows_L: RowsPerExpert | None,
    ) -> Tensor:
        inner = fp8.backend.swiglu_quantize_rowwise(gate_up_RF, gates_R, fp8.scale_format)
        blocks = fp8.quantized_weight(weight)
        ctx.fp8, ctx.weight, ctx.rows, ctx.left = fp8, weight, rows_L, get_active_collector()
        kept = fp8.backend.quantize_rowwise(gate_up_RF, fp8.scale_format)
        gates = () if gates_R is None else (gates_R,)
        ctx.save_for_backward(kept.values_XD, kept.scales_XQ, blocks.values_NK, blocks.scales_PQ, *gates)
        return fp8.gemm(inner, blocks, rows_L, gate_up_RF.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept, scales, values, block_scales, *gates = ctx.saved_tensors
        grad_RN, fp8 = grads[0], ctx.fp8
        gate_up_RF, gates_R = (
            dequantize_rowwise(RowwiseFp8Tensor(kept, scales), grad_RN.dtype),
            gates[0] if gates else None,
        )
        received = ctx.rows is not None
        grad_tiles = fp8.backend.quantize_rowwise(grad_RN, ScaleFormat.POWER_OF_TWO if received else fp8.scale_format)
        rows_L = ctx.rows or (len(grad_RN),)
        if received:  # in FP8 perhaps: both products see what an FP8 wire brings
            grad = fp8.backend.rowwise_to_columnwise(grad_tiles, rows_L, fp8.scale_format)
        else:
            grad = fp8.backend.quantize_columnwise(grad_RN, rows_L, fp8.scale_format)
        inner = fp8.backend.swiglu_quantize_columnwise(gate_up_RF, gates_R, rows_L, fp8.scale_format)
        grad_weight = _leave(ctx, grad, lambda: inner)
        blocks = fp8.weight_cache.get_transposed(ctx.weight, Fp8Weight(values, block_scales))
        grad_inner_RK = fp8.gemm(grad_tiles, blocks, ctx.rows, grad_RN.dtype)
        return *swiglu_backward(gate_up_RF, gates_R, grad_inner_RK), grad_weight, None, None


def _leave(ctx: Any, grad: ColumnwiseFp8Tensor, x: Callable[[], ColumnwiseFp8Tensor]) -> Tensor | None:
    """Leave the gradient of the weight with whoever collects them, or hand it to autograd where nobody does.

    Until then `grad` and what makes `x` are held, both of them FP8.
    """
    weight, backend = ctx.weight, ctx.fp8.backend
    if not weight.requires_grad:
        return None

    def product() -> Tensor:
        out: Tensor = backend.grouped_wgrad_gemm(grad, x())
        return out.view_as(weight)

    def add() -> None:
        if weight.grad is None:
            accumulate_grad(weight, product())
        else:
            backend.accumulate_grouped_wgrad(grad, x(), weight.grad.view(-1, *weight.shape[-2:]))

    if ctx.left is None:
        return product().to(weight.dtype)
    ctx.left.add_task(add)
    return None
