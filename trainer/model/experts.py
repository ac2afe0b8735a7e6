"""Feed-forward networks: a dense one, and experts computed as grouped GEMMs (report §2.1.2, eq. 12).

A rank that receives many more rows than its share computes them in row blocks, which bounds its memory. The
intermediate activations of an expert are several times as large as its rows. In blocks they exist for one block at a
time, in the forward and again in the backward; only rows and gate weights are saved. An overloaded rank is then slower,
but needs memory only for rows, results, their gradients and one block. Weight gradients are computed block by block in
the backward of inputs and are not delayed.

Letters: T tokens, D hidden, F inner width, R received rows, L experts on this rank, B blocks.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...comm.fp8 import TILE_WIDTH, QuantizedRows, nan_placeholder
from ...comm.host_transfer import to_device
from ...parallelism.weight_grad import DelayedWeightGradients, accumulate_grad, get_active_collector
from ..costs.operation_memory import MicroBatchShape, OperationMemory, SavedActivation
from ..precision.fp8 import Fp8LinearOps
from ..precision.fp8_tensors import RowwiseFp8Tensor, rowwise_fp8_bytes
from ..precision.reference import quantize_columnwise_workspace_bytes
from ..precision.swiglu import swiglu
from .config import ModelConfig
from .linear import Linear, gemm_bytes, linear_input, output_gradient_bytes, wgrad_bytes
from .recompute import RecomputeModule, run_recomputable

ExpertFunction = Callable[[Tensor, Tensor, tuple[int, ...], RowwiseFp8Tensor | None], Tensor]
"""Function from rows, gate weights, rows per expert, and the rows in FP8 (or None) to results, row by row."""


def compute_in_row_blocks(
    function: ExpertFunction,
    rows_RD: Tensor,
    weights_R: Tensor,
    rows_per_expert_L: tuple[int, ...],
    block_rows: int,
    tiles: RowwiseFp8Tensor | None,
) -> Tensor:
    """Apply `function` to all rows, at most `block_rows` (a multiple of 128) at a time; return [R, D].

    If `tiles` are given, they hold the rows and are saved; only shape and dtype of `rows_RD` are used.
    """
    blocks = tuple(split_into_row_blocks(rows_per_expert_L, block_rows))
    out: Tensor = _InBlocks.apply(rows_RD, weights_R, function, blocks, tiles)  # type: ignore[no-untyped-call]
    return out


def split_into_row_blocks(rows_per_expert_L: tuple[int, ...], block_rows: int) -> Iterator[tuple[int, ...]]:
    """Yield the number of rows of each expert in each block, [B, L]."""
    # Only multiples of 128 of an expert's rows end a block: the 128 × 1 FP8 tiles of the weight gradient then hold the
    # same rows as without blocks, and the results are the same.
    experts = len(rows_per_expert_L)
    counts, room = [0] * experts, block_rows
    for expert, left in enumerate(rows_per_expert_L):
        while left > room:
            taken = room // TILE_WIDTH * TILE_WIDTH
            counts[expert] += taken
            yield tuple(counts)
            counts, room, left = [0] * experts, block_rows, left - taken
        counts[expert] += left
        room -= left
    if any(counts):
        yield tuple(counts)


class _InBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        weights_R: Tensor,
        function: ExpertFunction,
        blocks: tuple[tuple[int, ...], ...],
        tiles: RowwiseFp8Tensor | None,
    ) -> Tensor:
        ctx.function, ctx.blocks, ctx.dtype = function, blocks, rows_RD.dtype
        if any(ctx.needs_input_grad):
            kept = (rows_RD,) if tiles is None else (tiles.values_XD, tiles.scales_XQ)
            ctx.save_for_backward(weights_R, *kept)
        out_RD = rows_RD.new_empty(rows_RD.shape)
        for part, counts_L in _parts(blocks):
            out_RD[part] = function(rows_RD[part], weights_R[part], counts_L, tiles and tiles.slice_rows(part))
        return out_RD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weights_R, *kept = ctx.saved_tensors
        grad_rows_RD = torch.empty(grads[0].shape, dtype=ctx.dtype, device=grads[0].device)
        grad_weights_R = torch.empty_like(weights_R)
        for part, counts_L in _parts(ctx.blocks):
            # Run the block forward again under autograd: nothing between its rows and its results was saved.
            tiles = RowwiseFp8Tensor(*kept).slice_rows(part) if len(kept) == 2 else None
            rows = kept[0][part].detach() if tiles is None else nan_placeholder(tiles.values_XD, ctx.dtype)
            leaves = rows.requires_grad_(), weights_R[part].detach().requires_grad_()
            work = DelayedWeightGradients()
            with torch.enable_grad(), work.collect_from_forward():
                out = ctx.function(*leaves, counts_L, tiles)
            grad_rows_RD[part], grad_weights_R[part] = torch.autograd.grad(out, leaves, grads[0][part])
            work.flush()  # now, not in W: delaying it would hold the activations of every block
        return grad_rows_RD, grad_weights_R, None, None, None


def _parts(blocks: tuple[tuple[int, ...], ...]) -> Iterator[tuple[slice, tuple[int, ...]]]:
    """Yield the rows of each block, and the number of rows of each expert in it."""
    start = 0
    for counts_L in blocks:
        stop = start + sum(counts_L)
        yield slice(start, stop), counts_L
        start = stop


class SwiGLUFeedForward(nn.Module):
    """Feed-forward network W_down (silu(W_gate x) ⊙ W_up x)."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_up = Linear(hidden, 2 * inner)
        self.down = Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Compute [..., D] from [..., D]."""
        gate_up: Tensor = run_recomputable(RecomputeModule.GATE_UP, self.gate_up, x)
        return self.down.forward_swiglu(gate_up)


class GroupedExperts(nn.Module):
    """Routed experts of one rank, as two stacked weights."""

    def __init__(self, local_experts: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_up_LFD = nn.Parameter(torch.empty(local_experts, 2 * inner, hidden))
        self.down_LDF = nn.Parameter(torch.empty(local_experts, hidden, inner))
        self.fp8: Fp8LinearOps | None = None
        self.block_rows: int | None = None
        """Largest number of rows per block; None: all rows in one call."""

    def forward(
        self,
        rows_RD: Tensor,
        weights_R: Tensor,
        rows_per_expert_L: tuple[int, ...],
        prequantized: QuantizedRows | None = None,
    ) -> Tensor:
        """Compute [R, D] from rows [R, D] grouped by expert; each result is multiplied by its row's gate weight.

        `prequantized`: the rows in FP8 if they were dispatched in it; `rows_RD` is then a `nan_placeholder`.
        """
        # The gate weight multiplies before the down projection, so that combine is a plain sum.
        tiles = None if prequantized is None else RowwiseFp8Tensor.from_received(prequantized)
        if self.block_rows is None or len(rows_RD) <= self.block_rows:
            return self._compute(rows_RD, weights_R, rows_per_expert_L, tiles)
        if tiles is None and self.fp8 is not None:
            tiles = self.fp8.quantize_received_rows(rows_RD)
        return compute_in_row_blocks(self._compute, rows_RD, weights_R, rows_per_expert_L, self.block_rows, tiles)

    def _compute(
        self, rows_RD: Tensor, weights_R: Tensor, rows_per_expert_L: tuple[int, ...], tiles: RowwiseFp8Tensor | None
    ) -> Tensor:
        if self.fp8 is not None:
            gate_up_RF = self.fp8.experts_gate_up(rows_RD, self.gate_up_LFD, rows_per_expert_L, tiles)
            return self.fp8.swiglu_down(gate_up_RF, weights_R, self.down_LDF, rows_per_expert_L)
        gate_up_RF = run_recomputable(
            RecomputeModule.GATE_UP, grouped_linear, rows_RD, self.gate_up_LFD, rows_per_expert_L
        )
        inner_RF = run_recomputable(RecomputeModule.SWIGLU, swiglu, gate_up_RF, weights_R)
        return grouped_linear(inner_RF, self.down_LDF, rows_per_expert_L)


def grouped_linear(x_RK: Tensor, weight_LNK: Tensor, rows_per_expert_L: tuple[int, ...]) -> Tensor:
    """Multiply rows by the transposed weight of their expert, [R, N], in the dtype of the rows.

    Like `linear`, it defers the weight gradient to the active collector, if there is one.
    """
    if get_active_collector() is None or not torch.is_grad_enabled():
        return grouped_mm(x_RK, weight_LNK.to(x_RK.dtype), rows_per_expert_L)
    out: Tensor = _GroupedLinear.apply(x_RK, weight_LNK, rows_per_expert_L)  # type: ignore[no-untyped-call]
    return out


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RK: Tensor, weight_LNK: Tensor, rows_per_expert_L: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x_RK)
        ctx.weight, ctx.left, ctx.rows = weight_LNK, get_active_collector(), rows_per_expert_L
        return grouped_mm(x_RK, weight_LNK.to(x_RK.dtype), rows_per_expert_L)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x_RK,), weight_LNK, rows_L = ctx.saved_tensors, ctx.weight, ctx.rows
        grad_RN = grads[0].contiguous()
        ctx.left.add_task(lambda: accumulate_grouped_wgrad(weight_LNK, grad_RN, x_RK, rows_L))
        return grouped_mm(grad_RN, weight_LNK.to(grad_RN.dtype).transpose(1, 2), rows_L), None, None


def accumulate_grouped_wgrad(
    weight_LNK: Tensor, grad_RN: Tensor, x_RK: Tensor, rows_per_expert_L: tuple[int, ...]
) -> None:
    """Add gradᵀ x of each expert's rows to the gradient of its weight."""
    # With equal dtypes the GEMM accumulates in place: the gradient is read and written once, while it is in a cache.
    summed_LNK = weight_LNK.grad
    if summed_LNK is None or summed_LNK.dtype != grad_RN.dtype:
        accumulate_grad(weight_LNK, grouped_wgrad(grad_RN, x_RK, rows_per_expert_L))
        return
    pairs = zip(grad_RN.split(rows_per_expert_L), x_RK.split(rows_per_expert_L), strict=True)
    for summed_NK, (grad, x) in zip(summed_LNK, pairs, strict=True):
        summed_NK.addmm_(grad.T, x)


def grouped_wgrad(grad_RN: Tensor, x_RK: Tensor, rows_per_expert_L: tuple[int, ...]) -> Tensor:
    """Return gradᵀ x of each expert's rows, [L, N, K], the experts' weight gradients; 0 for an expert without rows."""
    if x_RK.dtype == torch.float64:
        return grouped_wgrad_reference(grad_RN, x_RK, rows_per_expert_L)
    return F.grouped_mm(grad_RN.T, x_RK, offs=_ends(rows_per_expert_L, x_RK.device))


def grouped_wgrad_reference(grad_RN: Tensor, x_RK: Tensor, rows_per_expert_L: tuple[int, ...]) -> Tensor:
    """Reference of `grouped_wgrad`: one expert at a time; also used in FP64."""
    pairs = zip(grad_RN.split(rows_per_expert_L), x_RK.split(rows_per_expert_L), strict=True)
    return torch.stack([grad.T @ x for grad, x in pairs])


def grouped_mm(x_RK: Tensor, weight_LNK: Tensor, rows_per_expert_L: tuple[int, ...]) -> Tensor:
    """Multiply rows by the transposed weight of their expert, [R, N]; `rows_per_expert_L` sums to R."""
    if x_RK.dtype == torch.float64:
        return grouped_mm_reference(x_RK, weight_LNK, rows_per_expert_L)
    return F.grouped_mm(x_RK, weight_LNK.transpose(1, 2), offs=_ends(rows_per_expert_L, x_RK.device))


def grouped_mm_reference(x_RK: Tensor, weight_LNK: Tensor, rows_per_expert_L: tuple[int, ...]) -> Tensor:
    """Reference of `grouped_mm`: one expert at a time; also used in FP64, which `F.grouped_mm` lacks."""
    parts = x_RK.split(rows_per_expert_L)
    return torch.cat([F.linear(part, weight) for part, weight in zip(parts, weight_LNK, strict=True)])


def _ends(rows_per_expert_L: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the index after the last row of each expert, int32 [L]."""
    return to_device(torch.tensor(rows_per_expert_L, dtype=torch.int32).cumsum(0, dtype=torch.int32), device)


def feed_forward_memory(
    rows: float, hidden: int, inner: int, batch: MicroBatchShape, experts: int = 1
) -> OperationMemory:
    """Return the memory of a feed-forward network without its input and result, or of `experts` experts' networks."""
    if not inner:
        return OperationMemory()
    size = batch.element_bytes
    # FP8 saves gate and up projections in tiles, recomputes SwiGLU from them, and holds that between I and W.
    if batch.fp8:
        kept = [SavedActivation("FP8 gate and up projections", rowwise_fp8_bytes(rows, 2 * inner))]
        widths, whole = [2 * inner, hidden, inner], 3 * rows * inner * size
    else:
        kept = [
            SavedActivation("gate and up projections", rows * 2 * inner * size, RecomputeModule.GATE_UP),
            SavedActivation("SwiGLU", rows * inner * size, RecomputeModule.SWIGLU, needed_for_wgrad=True),
        ]
        widths, whole = [2 * inner, hidden], 0.0
    # The backward has two peaks: at SwiGLU its gradients (2 F wide), the incoming gradient and two intermediate
    # products (F each), with two FP32 copies; and later the gradients of rows and of SwiGLU.
    swiglu = rows * inner * (5 * size + (2 * batch.fp32_element_bytes if batch.is_narrow else 0))
    product = gemm_bytes(rows, hidden, 2 * inner, batch, experts)
    columns = quantize_columnwise_workspace_bytes(rows, 2 * inner, experts) if batch.emulates_fp8 else 0.0
    return OperationMemory(
        tuple(kept),
        output_gradient_bytes(rows, widths, batch, experts),
        wgrad_bytes(rows, hidden, 2 * inner, batch, experts),
        forward_workspace=whole + product,
        backward_workspace=whole + max(swiglu, rows * (hidden + inner) * size) + max(product, columns),
    )


def shared_experts_memory(config: ModelConfig, batch: MicroBatchShape) -> OperationMemory:
    """Return the memory of the shared experts. Their input is saved before them, but for its FP8 copy."""
    inner = config.n_shared_experts * config.moe_intermediate_size
    copied = (linear_input("FP8 input", batch.tokens, config.hidden_size, batch),) if inner and batch.fp8 else ()
    return OperationMemory(copied) + feed_forward_memory(batch.tokens, config.hidden_size, inner, batch)


def routed_experts_memory(
    config: ModelConfig, batch: MicroBatchShape, local_experts: int, policy: Collection[RecomputeModule] = ()
) -> OperationMemory:
    """Return the memory of the routed experts of one rank; `policy` matters only in row blocks."""
    hidden, inner, size = config.hidden_size, config.moe_intermediate_size, batch.element_bytes
    rows, in_blocks = batch.received_rows(config), batch.uses_row_blocks(config)
    received = rowwise_fp8_bytes(rows, hidden) if batch.fp8 else rows * hidden * size
    kept = (
        # Row blocks compute their weight gradients in I, so the rows are not held for W.
        SavedActivation("received rows", received, needed_for_wgrad=not in_blocks),
        SavedActivation("their gate weights", rows * batch.fp32_element_bytes),
    )
    if not in_blocks:
        return OperationMemory(kept) + feed_forward_memory(rows, hidden, inner, batch, local_experts)
    assert batch.expert_block_rows is not None
    block_rows = batch.expert_block_rows
    block = feed_forward_memory(block_rows, hidden, inner, batch, local_experts)
    # A block runs its forward again, so it also holds its activations (3 F), its results and their gradients, and its
    # rows except in FP8 (2 or 3 D); and it computes weight gradients now instead of delaying them.
    intermediates = block_rows * (3 * inner + (2 if batch.fp8 else 3) * hidden) * size
    wgrad = wgrad_bytes(rows, hidden, 2 * inner, batch, local_experts)
    forward, backward = block.workspace_bytes(policy)
    return OperationMemory(
        kept,
        wgrad=wgrad,
        forward_workspace=forward,
        backward_workspace=intermediates + max(backward, wgrad),
    )
