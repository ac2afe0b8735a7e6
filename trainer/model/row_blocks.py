"""More rows than fit at once, in blocks: what protects a rank that routing sends far more than its share.

What an expert makes on its way from a row to a result is as large as the rows several times over. In blocks it exists
for one block at a time, in the forward and again in the backward: between them the rows and gate weights alone are
kept. So an overloaded rank takes longer, and needs the rows, results and their gradients, and room for one block.

Gradients of weights are formed block by block in the backward of inputs, and not put off.

Letters: R received rows, D hidden, L experts on this rank, B blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...comm.fp8 import TILE, stand_in
from ...parallelism.weight_grad import WeightGradients
from ..precision.tiles import Tiles

Function = Callable[[Tensor, Tensor, tuple[int, ...], Tiles | None], Tensor]
"""Rows, their gate weights, how many each expert has, and their tiles if there are any, to results: row by row."""


def in_blocks(
    function: Function,
    rows_RD: Tensor,
    weights_R: Tensor,
    rows_per_expert_L: tuple[int, ...],
    block: int,
    tiles: Tiles | None,
) -> Tensor:
    """`function` over all rows, of at most `block` at a time, a multiple of 128; [R, D].

    Where there are `tiles`, they are the rows: they are kept, and of `rows_RD` nothing but shape and dtype is used.
    """
    blocks = tuple(cut(rows_per_expert_L, block))
    out: Tensor = _InBlocks.apply(rows_RD, weights_R, function, blocks, tiles)  # type: ignore[no-untyped-call]
    return out


def cut(rows_per_expert_L: tuple[int, ...], block: int) -> Iterator[tuple[int, ...]]:
    """How many rows of each expert are in each block, [B, L].

    An expert's rows are cut at multiples of 128 alone: FP8 tiles of 128 × 1 then hold what they would without blocks.
    """
    experts = len(rows_per_expert_L)
    counts, room = [0] * experts, block
    for expert, left in enumerate(rows_per_expert_L):
        while left > room:
            taken = room // TILE * TILE
            counts[expert] += taken
            yield tuple(counts)
            counts, room, left = [0] * experts, block, left - taken
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
        function: Function,
        blocks: tuple[tuple[int, ...], ...],
        tiles: Tiles | None,
    ) -> Tensor:
        ctx.function, ctx.blocks, ctx.dtype = function, blocks, rows_RD.dtype
        if any(ctx.needs_input_grad):
            kept = (rows_RD,) if tiles is None else (tiles.values_XD, tiles.scales_XQ)
            ctx.save_for_backward(weights_R, *kept)
        out_RD = rows_RD.new_empty(rows_RD.shape)
        for part, counts_L in _parts(blocks):
            out_RD[part] = function(rows_RD[part], weights_R[part], counts_L, tiles and tiles.part(part))
        return out_RD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weights_R, *kept = ctx.saved_tensors
        grad_rows_RD = torch.empty(grads[0].shape, dtype=ctx.dtype, device=grads[0].device)
        grad_weights_R = torch.empty_like(weights_R)
        for part, counts_L in _parts(ctx.blocks):
            tiles = Tiles(*kept).part(part) if len(kept) == 2 else None
            rows = kept[0][part].detach() if tiles is None else stand_in(tiles.values_XD, ctx.dtype)
            leaves = rows.requires_grad_(), weights_R[part].detach().requires_grad_()
            work = WeightGradients()
            with torch.enable_grad(), work.collect():
                out = ctx.function(*leaves, counts_L, tiles)
            grad_rows_RD[part], grad_weights_R[part] = torch.autograd.grad(out, leaves, grads[0][part])
            work.run()
        return grad_rows_RD, grad_weights_R, None, None, None


def _parts(blocks: tuple[tuple[int, ...], ...]) -> Iterator[tuple[slice, tuple[int, ...]]]:
    """The rows of each block, and how many of them each expert has."""
    start = 0
    for counts_L in blocks:
        stop = start + sum(counts_L)
        yield slice(start, stop), counts_L
        start = stop
