"""Rows received in FP8 are multiplied unchanged, and give the bits of rows that are widened and quantized again."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from shoestring.comm.fp8 import QuantizedRows, dequantize, nan_placeholder, quantize
from shoestring.parallelism.weight_grad import DelayedWeightGradients
from shoestring.trainer.model.experts import GroupedExperts
from shoestring.trainer.precision.fp8 import Fp8LinearOps
from shoestring.trainer.precision.fp8_tensors import RowwiseFp8Tensor, ScaleFormat, quantize_rowwise
from shoestring.trainer.precision.reference import ReferenceBackend

WIDTH, INNER, BLOCK = 200, 96, 256
ROWS = [(300, 0, 170), (20, 0, 0), (0, 0, 0)]
DTYPES = [torch.bfloat16, torch.float32, torch.float64]


@dataclass(frozen=True)
class Recording(ReferenceBackend):
    """A backend that records how many received rows it quantizes."""

    seen: list[int] = field(default_factory=list)

    def quantize_rowwise(self, x_XD: Tensor, scales: ScaleFormat) -> RowwiseFp8Tensor:
        if scales is ScaleFormat.POWER_OF_TWO:
            self.seen.append(len(x_XD))
        return super().quantize_rowwise(x_XD, scales)


def received_rows(rows: int, dtype: torch.dtype) -> QuantizedRows:
    """Return rows as a wire delivers them. One row's largest number is 224: its widened tile has half the scale."""
    x_RD = torch.randn((rows, WIDTH), generator=torch.Generator().manual_seed(rows), dtype=dtype)
    x_RD[:1, :2] = torch.tensor([225.0, 300.0 * 2.0**-9])
    return QuantizedRows(*quantize(x_RD))


def outcome(
    rows: tuple[int, ...], dtype: torch.dtype, block: int | None, *, as_tiles: bool
) -> tuple[dict[str, Tensor], list[int], list[int]]:
    """Return result and gradients, and the received rows that the forward and the backward quantized."""
    generator = torch.Generator().manual_seed(1)
    recording, module = Recording(), GroupedExperts(len(rows), WIDTH, INNER)
    module.fp8, module.block_rows = Fp8LinearOps(recording), block
    for weight in module.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) / 10
    tiles = received_rows(sum(rows), dtype)
    widened_RD = dequantize(tiles.values_XD, tiles.exponents_XQ, dtype)
    rows_RD = (nan_placeholder(tiles.values_XD, dtype) if as_tiles else widened_RD).requires_grad_()
    gates_R = torch.rand(sum(rows), generator=generator).to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    left = DelayedWeightGradients()
    with left.collect_from_forward():
        out_RD = module(rows_RD, gates_R, rows, tiles if as_tiles else None)
    in_forward = list(recording.seen)
    with torch.no_grad():
        evaluated_RD = module(rows_RD, gates_R, rows, tiles if as_tiles else None)
    assert torch.equal(evaluated_RD, out_RD)
    recording.seen.clear()
    out_RD.backward(torch.randn(out_RD.shape, generator=generator, dtype=dtype))
    left.flush()
    found = {"out": out_RD.detach(), "rows": rows_RD.grad, "gates": gates_R.grad}
    found |= {name: weight.grad for name, weight in module.named_parameters()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}, in_forward, recording.seen


@pytest.mark.parametrize("block", [None, BLOCK])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_as_they_came_they_give_the_same_bits(rows: tuple[int, ...], dtype: torch.dtype, block: int | None) -> None:
    ours, in_forward, in_backward = outcome(rows, dtype, block, as_tiles=True)
    theirs, again, of_gradients = outcome(rows, dtype, block, as_tiles=False)
    assert (in_forward, again) == ([], [sum(rows)])
    assert in_backward == of_gradients  # rows from combine's backward
    assert len(ours) == len(theirs) == 5
    assert all(tensor.dtype == theirs[name].dtype for name, tensor in ours.items())
    assert all(tensor.isfinite().all() for tensor in ours.values())
    assert not [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]


@pytest.mark.parametrize("width", [1, 127, 128, 200, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_crosses_is_what_would_be_quantized_here(dtype: torch.dtype, width: int) -> None:
    """Values and scales are equal, also in partial tiles and for NaN, infinity and zero."""
    x_XD = torch.randn((40, width)) * torch.logspace(-44, 38, 40)[:, None]
    x_XD[3] = 0.0
    x_XD[5, -1], x_XD[6, 0] = torch.nan, torch.inf
    x_XD = x_XD.to(dtype)
    ours, theirs = (
        RowwiseFp8Tensor.from_received(QuantizedRows(*quantize(x_XD))),
        quantize_rowwise(x_XD, ScaleFormat.POWER_OF_TWO),
    )
    assert (ours.values_XD.dtype, ours.scales_XQ.dtype) == (theirs.values_XD.dtype, theirs.scales_XQ.dtype)
    assert torch.equal(ours.scales_XQ.nan_to_num(-1.0), theirs.scales_XQ.nan_to_num(-1.0))
    assert torch.equal(ours.values_XD.view(torch.uint8), theirs.values_XD.view(torch.uint8))
