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

from ...parallelism.weight_grad import add_to_grad, collecting
from ..model.recompute import is_made_again
from .backend import PrecisionBackend, Rows
from .e5m6 import PackedRows, pack_e5m6, unpack_e5m6
from .shared_output import SharedOutput
from .swiglu import gradients_of_rows
from .tiles import Blocks, Columns, Scales, Tiles, dequantize_tiles
from .weights import StepWeights


@dataclass(frozen=True)
class Fp8:
    """How the Linears of one model compute."""

    provider: PrecisionBackend
    scales: Scales = Scales.FP32
    """Of all but those which the report wants to be powers of two: the input of the Linear after attention, the rows
    that experts receive, and the gradients that they receive. The last two are what crosses between ranks in FP8: rows
    that came in FP8 are taken as they came, and tiles made of such gradients hold the numbers that came."""
    weights: StepWeights = field(default_factory=StepWeights)

    def linear(
        self, x: Tensor, weight_NK: Tensor, *, after_attention: bool = False, shared: SharedOutput | None = None
    ) -> Tensor:
        """x Wᵀ, [..., K] to [..., N], in the dtype of `x`. `shared`: the attention whose output `x` is."""
        x_RK = x.flatten(0, -2)
        scales = Scales.POWER_OF_TWO if after_attention else self.scales
        if torch.is_grad_enabled():
            out: Tensor = _Linear.apply(x_RK, weight_NK, self, None, scales, after_attention, shared, None)  # type: ignore[no-untyped-call]
        else:
            out = self._product(self.provider.tiles(x_RK, scales), weight_NK, None, x_RK.dtype)
        return out.view(*x.shape[:-1], len(weight_NK))

    def linear_of_swiglu(self, gate_up: Tensor, weight_NK: Tensor) -> Tensor:
        """SwiGLU(gate_up) Wᵀ, [..., 2F] to [..., N], keeping tiles of `gate_up` alone."""
        out = self._of_swiglu(gate_up.flatten(0, -2), None, weight_NK, None)
        return out.view(*gate_up.shape[:-1], len(weight_NK))

    def received(self, rows_RK: Tensor) -> Tiles:
        """Received rows as they would have come on an FP8 wire."""
        return self.provider.tiles(rows_RK, Scales.POWER_OF_TWO)

    def experts_up(self, rows_RK: Tensor, weight_LNK: Tensor, rows_L: Rows, came: Tiles | None = None) -> Tensor:
        """Each received row times the transposed weight of its expert, [R, N]; `came`: the rows where they came in FP8.

        Then of `rows_RK` nothing but shape and dtype is used.
        """
        if not torch.is_grad_enabled():
            tiles = self.received(rows_RK) if came is None else came
            return self._product(tiles, weight_LNK, rows_L, rows_RK.dtype)
        scales = Scales.POWER_OF_TWO
        out: Tensor = _Linear.apply(rows_RK, weight_LNK, self, rows_L, scales, False, None, came)  # type: ignore[no-untyped-call]
        return out

    def experts_down(self, gate_up_RF: Tensor, gates_R: Tensor, weight_LNK: Tensor, rows_L: Rows) -> Tensor:
        """SwiGLU(gate_up) times the row's gate weight, times the transposed weight of its expert, [R, N]."""
        return self._of_swiglu(gate_up_RF, gates_R, weight_LNK, rows_L)

    def _of_swiglu(self, gate_up_RF: Tensor, gates_R: Tensor | None, weight: Tensor, rows_L: Rows | None) -> Tensor:
        if not torch.is_grad_enabled():
            x = self.provider.swiglu_tiles(gate_up_RF, gates_R, self.scales)
            return self._product(x, weight, rows_L, gate_up_RF.dtype)
        out: Tensor = _LinearOfSwiGLU.apply(gate_up_RF, gates_R, weight, self, rows_L)  # type: ignore[no-untyped-call]
        return out

    def _product(self, x: Tiles, weight: Tensor, rows_L: Rows | None, dtype: torch.dtype) -> Tensor:
        """x Wᵀ with nothing kept."""
        return self.multiply(x, self.blocks(weight), rows_L, dtype)

    def multiply(self, x: Tiles, blocks: Blocks, rows_L: Rows | None, dtype: torch.dtype) -> Tensor:
        """x Wᵀ of one weight, or of each row's expert."""
        if rows_L is None:
            return self.provider.multiply(x, blocks, dtype)
        return self.provider.multiply_grouped(x, blocks, rows_L, dtype)

    def blocks(self, weight: Tensor) -> Blocks:
        """Of a weight, once a step."""
        return self.weights.blocks(weight, lambda w: self.provider.blocks(w, self.scales))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RK: Tensor,
        weight: Tensor,
        fp8: Fp8,
        rows_L: Rows | None,
        scales: Scales,
        after_attention: bool,
        shared: SharedOutput | None,
        came: Tiles | None,
    ) -> Tensor:
        x = fp8.provider.tiles(x_RK, scales) if came is None else came
        blocks = fp8.blocks(weight)
        ctx.fp8, ctx.weight, ctx.rows, ctx.left, ctx.x_scales = fp8, weight, rows_L, collecting(), scales
        ctx.packed_width = None
        kept: tuple[Tensor, ...]
        if after_attention:
            packed = pack_e5m6(x_RK)
            ctx.packed_width, kept = packed.width, (packed.bytes_XB, packed.exponents_XQ)
            if shared is not None:
                shared.pack(packed)
        elif is_made_again(x_RK):
            kept = (x_RK,)
        else:
            kept = (x.values_XD, x.scales_XQ)
        ctx.save_for_backward(blocks.values_NK, blocks.scales_PQ, *kept)
        return fp8.multiply(x, blocks, rows_L, x_RK.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, block_scales, *kept = ctx.saved_tensors
        grad_RN, fp8, width, scales = grads[0], ctx.fp8, ctx.packed_width, ctx.x_scales
        rows_L = ctx.rows or (len(grad_RN),)

        def columns(tiles: Tiles) -> Columns:
            made: Columns = fp8.provider.turned(tiles, rows_L, scales)
            return made

        def x() -> Columns:
            if width is None:
                return columns(Tiles(kept[0], kept[1]))
            wide_RK = unpack_e5m6(PackedRows(kept[0], kept[1], width), torch.float32)
            made: Columns = fp8.provider.columns(wide_RK, rows_L, scales)
            return made

        if len(kept) == 1:  # wide: what waits for its product shall be FP8
            made = columns(fp8.provider.tiles(kept[0], scales))
            grad_weight = _leave(ctx, fp8.provider.columns(grad_RN, rows_L, fp8.scales), lambda: made)
        else:
            grad_weight = _leave(ctx, fp8.provider.columns(grad_RN, rows_L, fp8.scales), x)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None, None, None, None, None, None
        grad_tiles = fp8.provider.tiles(grad_RN, fp8.scales)
        turned = fp8.weights.turned(ctx.weight, Blocks(values, block_scales))
        grad_x_RK = fp8.multiply(grad_tiles, turned, ctx.rows, grad_RN.dtype)
        return grad_x_RK, grad_weight, None, None, None, None, None, None


class _LinearOfSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate_up_RF: Tensor, gates_R: Tensor | None, weight: Tensor, fp8: Fp8, rows_L: Rows | None
    ) -> Tensor:
        inner = fp8.provider.swiglu_tiles(gate_up_RF, gates_R, fp8.scales)
        blocks = fp8.blocks(weight)
        ctx.fp8, ctx.weight, ctx.rows, ctx.left = fp8, weight, rows_L, collecting()
        kept = fp8.provider.tiles(gate_up_RF, fp8.scales)
        gates = () if gates_R is None else (gates_R,)
        ctx.save_for_backward(kept.values_XD, kept.scales_XQ, blocks.values_NK, blocks.scales_PQ, *gates)
        return fp8.multiply(inner, blocks, rows_L, gate_up_RF.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept, scales, values, block_scales, *gates = ctx.saved_tensors
        grad_RN, fp8 = grads[0], ctx.fp8
        gate_up_RF, gates_R = dequantize_tiles(Tiles(kept, scales), grad_RN.dtype), gates[0] if gates else None
        received = ctx.rows is not None
        grad_tiles = fp8.provider.tiles(grad_RN, Scales.POWER_OF_TWO if received else fp8.scales)
        rows_L = ctx.rows or (len(grad_RN),)
        if received:  # in FP8 perhaps: both products see what an FP8 wire brings
            grad = fp8.provider.turned(grad_tiles, rows_L, fp8.scales)
        else:
            grad = fp8.provider.columns(grad_RN, rows_L, fp8.scales)
        inner = fp8.provider.swiglu_columns(gate_up_RF, gates_R, rows_L, fp8.scales)
        grad_weight = _leave(ctx, grad, lambda: inner)
        blocks = fp8.weights.turned(ctx.weight, Blocks(values, block_scales))
        grad_inner_RK = fp8.multiply(grad_tiles, blocks, ctx.rows, grad_RN.dtype)
        return *gradients_of_rows(gate_up_RF, gates_R, grad_inner_RK), grad_weight, None, None


def _leave(ctx: Any, grad: Columns, x: Callable[[], Columns]) -> Tensor | None:
    """Leave the gradient of the weight with whoever collects them, or hand it to autograd where nobody does.

    Until then `grad` and what makes `x` are held, both of them FP8.
    """
    weight, provider = ctx.weight, ctx.fp8.provider
    if not weight.requires_grad:
        return None

    def product() -> Tensor:
        out: Tensor = provider.outer(grad, x())
        return out.view_as(weight)

    def add() -> None:
        if weight.grad is None:
            add_to_grad(weight, product())
        else:
            provider.add_outer(grad, x(), weight.grad.view(-1, *weight.shape[-2:]))

    if ctx.left is None:
        return product().to(weight.dtype)
    ctx.left.add(add)
    return None
