"""FP8 Linears: their three GEMMs, saved activations, and delayed weight gradients (report §3.3).

    forward          y  = x Wᵀ     x in 1 × 128 tiles, W in 128 × 128 blocks
    input gradient   dx = dy W     dy in 1 × 128 tiles, the same blocks, transposed
    weight gradient  dW = dyᵀ x    both in 128 × 1 tiles, the sum in FP32, added to the FP32 gradient

Saved of x are its FP8 tiles, which the backward quantizes again column-wise; for the Linear after attention, E5M6; and
if x is the output of a SwiGLU, the FP8 tiles of the SwiGLU's input, from which x is recomputed. Nothing is saved of an
x that the recompute policy recomputes anyway, except after attention.

Letters: R rows, L experts on this rank; N and K widths, F inner width.
"""

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
    """FP8 operations of the Linears of one model."""

    backend: PrecisionBackend
    # Report §3.3.3 requires powers of two for the input of the Linear after attention, and for the rows and gradients
    # that experts receive. The last two are dispatched in FP8: a power-of-two scale makes quantizing received numbers
    # again exact.
    scale_format: ScaleFormat = ScaleFormat.FP32
    """Format of all scales but those that are powers of two in the report."""
    weight_cache: Fp8WeightCache = field(default_factory=Fp8WeightCache)

    def linear(
        self,
        x: Tensor,
        weight_NK: Tensor,
        *,
        after_attention: bool = False,
        attention_output: SharedAttentionOutput | None = None,
    ) -> Tensor:
        """Compute x Wᵀ, [..., N], in the dtype of `x`. `attention_output`: the attention whose output `x` is."""
        x_RK = x.flatten(0, -2)
        scales = ScaleFormat.POWER_OF_TWO if after_attention else self.scale_format
        if torch.is_grad_enabled():
            out: Tensor = _Linear.apply(x_RK, weight_NK, self, None, scales, after_attention, attention_output, None)  # type: ignore[no-untyped-call]
        else:
            out = self._product(self.backend.quantize_rowwise(x_RK, scales), weight_NK, None, x_RK.dtype)
        return out.view(*x.shape[:-1], len(weight_NK))

    def swiglu_linear(self, gate_up: Tensor, weight_NK: Tensor) -> Tensor:
        """Compute SwiGLU(gate_up) Wᵀ, [..., 2F] to [..., N], saving only FP8 tiles of `gate_up`."""
        out = self.swiglu_down(gate_up.flatten(0, -2), None, weight_NK, None)
        return out.view(*gate_up.shape[:-1], len(weight_NK))

    def quantize_received_rows(self, rows_RK: Tensor) -> RowwiseFp8Tensor:
        """Quantize received rows as an FP8 dispatch would have sent them."""
        return self.backend.quantize_rowwise(rows_RK, ScaleFormat.POWER_OF_TWO)

    def experts_gate_up(
        self, rows_RK: Tensor, weight_LNK: Tensor, rows_L: RowsPerExpert, prequantized: RowwiseFp8Tensor | None = None
    ) -> Tensor:
        """Multiply each received row by the transposed weight of its expert, [R, N].

        `prequantized`: the rows if they were dispatched in FP8; only shape and dtype of `rows_RK` are then used.
        """
        if not torch.is_grad_enabled():
            tiles = self.quantize_received_rows(rows_RK) if prequantized is None else prequantized
            return self._product(tiles, weight_LNK, rows_L, rows_RK.dtype)
        scales = ScaleFormat.POWER_OF_TWO
        out: Tensor = _Linear.apply(rows_RK, weight_LNK, self, rows_L, scales, False, None, prequantized)  # type: ignore[no-untyped-call]
        return out

    def swiglu_down(
        self, gate_up_RF: Tensor, gates_R: Tensor | None, weight: Tensor, rows_L: RowsPerExpert | None
    ) -> Tensor:
        """Multiply SwiGLU(gate_up), times the row's gate weight, by the transposed weight of its expert, [R, N].

        Without `gates_R` and `rows_L`, multiply SwiGLU(gate_up) by the one transposed weight.
        """
        if not torch.is_grad_enabled():
            x = self.backend.swiglu_quantize_rowwise(gate_up_RF, gates_R, self.scale_format)
            return self._product(x, weight, rows_L, gate_up_RF.dtype)
        out: Tensor = _LinearOfSwiGLU.apply(gate_up_RF, gates_R, weight, self, rows_L)  # type: ignore[no-untyped-call]
        return out

    def _product(self, x: RowwiseFp8Tensor, weight: Tensor, rows_L: RowsPerExpert | None, dtype: torch.dtype) -> Tensor:
        """Compute x Wᵀ without saving anything."""
        return self.gemm(x, self.quantized_weight(weight), rows_L, dtype)

    def gemm(self, x: RowwiseFp8Tensor, blocks: Fp8Weight, rows_L: RowsPerExpert | None, dtype: torch.dtype) -> Tensor:
        """Compute x Wᵀ with one weight, or with that of each row's expert if `rows_L` is given."""
        if rows_L is None:
            return self.backend.gemm(x, blocks, dtype)
        return self.backend.grouped_gemm(x, blocks, rows_L, dtype)

    def quantized_weight(self, weight: Tensor) -> Fp8Weight:
        """Return the FP8 blocks of a weight, quantized once per step."""
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
        prequantized: RowwiseFp8Tensor | None,
    ) -> Tensor:
        x = fp8.backend.quantize_rowwise(x_RK, scales) if prequantized is None else prequantized
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
        fp8: Fp8LinearOps = ctx.fp8  # typed: `ctx` is Any, and mypy would miss a wrong name
        grad_RN, width, scales = grads[0], ctx.packed_width, ctx.x_scales
        rows_L = ctx.rows or (len(grad_RN),)

        def columns(tiles: RowwiseFp8Tensor) -> ColumnwiseFp8Tensor:
            return fp8.backend.rowwise_to_columnwise(tiles, rows_L, scales)

        def x() -> ColumnwiseFp8Tensor:
            if width is None:
                return columns(RowwiseFp8Tensor(kept[0], kept[1]))
            wide_RK = unpack_e5m6(E5M6Rows(kept[0], kept[1], width), torch.float32)
            return fp8.backend.quantize_columnwise(wide_RK, rows_L, scales)

        # A recomputed x is wide. It is quantized now, so that the delayed weight gradient holds only FP8.
        if len(kept) == 1:
            columns_of_x = columns(fp8.backend.quantize_rowwise(kept[0], scales))
            grad_weight = _delay_wgrad(
                ctx, fp8.backend.quantize_columnwise(grad_RN, rows_L, fp8.scale_format), lambda: columns_of_x
            )
        else:
            grad_weight = _delay_wgrad(ctx, fp8.backend.quantize_columnwise(grad_RN, rows_L, fp8.scale_format), x)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None, None, None, None, None, None
        grad_tiles = fp8.backend.quantize_rowwise(grad_RN, fp8.scale_format)
        transposed = fp8.weight_cache.get_transposed(ctx.weight, Fp8Weight(values, block_scales))
        grad_x_RK = fp8.gemm(grad_tiles, transposed, ctx.rows, grad_RN.dtype)
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
        fp8: Fp8LinearOps = ctx.fp8
        grad_RN = grads[0]
        gates_R = gates[0] if gates else None
        gate_up_RF = dequantize_rowwise(RowwiseFp8Tensor(kept, scales), grad_RN.dtype)
        received = ctx.rows is not None
        grad_tiles = fp8.backend.quantize_rowwise(grad_RN, ScaleFormat.POWER_OF_TWO if received else fp8.scale_format)
        rows_L = ctx.rows or (len(grad_RN),)
        # Gradients that experts receive may have been sent in FP8. Quantizing the columns from the FP8 rows makes the
        # weight gradient the same for wide and FP8 formats of the wire.
        if received:
            grad = fp8.backend.rowwise_to_columnwise(grad_tiles, rows_L, fp8.scale_format)
        else:
            grad = fp8.backend.quantize_columnwise(grad_RN, rows_L, fp8.scale_format)
        inner = fp8.backend.swiglu_quantize_columnwise(gate_up_RF, gates_R, rows_L, fp8.scale_format)
        grad_weight = _delay_wgrad(ctx, grad, lambda: inner)
        blocks = fp8.weight_cache.get_transposed(ctx.weight, Fp8Weight(values, block_scales))
        grad_inner_RK = fp8.gemm(grad_tiles, blocks, ctx.rows, grad_RN.dtype)
        return *swiglu_backward(gate_up_RF, gates_R, grad_inner_RK), grad_weight, None, None


def _delay_wgrad(ctx: Any, grad: ColumnwiseFp8Tensor, x: Callable[[], ColumnwiseFp8Tensor]) -> Tensor | None:
    """Defer the weight gradient to the active collector, or return it to autograd if there is none.

    Until then `grad` and the inputs of `x` are held, all of them FP8.
    """
    weight: Tensor = ctx.weight
    backend: PrecisionBackend = ctx.fp8.backend
    if not weight.requires_grad:
        return None

    def product() -> Tensor:
        return backend.grouped_wgrad_gemm(grad, x()).view_as(weight)

    def add() -> None:
        if weight.grad is None:
            accumulate_grad(weight, product())
        else:
            backend.accumulate_grouped_wgrad(grad, x(), weight.grad.view(-1, *weight.shape[-2:]))

    if ctx.left is None:
        return product().to(weight.dtype)
    ctx.left.add_task(add)
    return None
