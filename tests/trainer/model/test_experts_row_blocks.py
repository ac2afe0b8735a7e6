"""Rows computed in blocks: equal results and gradients, less memory kept and less allocated per step."""

import pytest
import torch
from torch import Tensor

from shoestring.parallelism.weight_grad import DelayedWeightGradients
from shoestring.tests.trainer.census import Census
from shoestring.trainer.model.experts import GroupedExperts, split_into_row_blocks
from shoestring.trainer.precision.fp8 import Fp8LinearOps
from shoestring.trainer.precision.reference import ReferenceBackend

HIDDEN, INNER, BLOCK = 64, 128, 256


@pytest.mark.parametrize(
    ("rows", "blocks"),
    [
        ((5, 0, 3), [(5, 0, 3)]),
        ((700, 0, 3), [(256, 0, 0), (256, 0, 0), (188, 0, 3)]),
        ((100, 300, 0), [(100, 128, 0), (0, 172, 0)]),  # an expert's rows are cut at a multiple of 128
        ((200, 300, 10), [(200, 0, 0), (0, 256, 0), (0, 44, 10)]),
        ((256, 256), [(256, 0), (0, 256)]),
        ((0, 0), []),
    ],
    ids=str,
)
def test_where_rows_are_cut(rows: tuple[int, ...], blocks: list[tuple[int, ...]]) -> None:
    found = list(split_into_row_blocks(rows, BLOCK))
    assert found == blocks
    assert all(sum(counts) <= BLOCK for counts in found)


def outcome(
    rows: tuple[int, ...], block: int | None, dtype: torch.dtype, *, fp8: bool = False, collects: bool = True
) -> list[Tensor]:
    """Return the result, and the gradients of rows, gate weights and both weights."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    experts = GroupedExperts(len(rows), HIDDEN, INNER).to(dtype)
    experts.block_rows, experts.fp8 = block, Fp8LinearOps(ReferenceBackend()) if fp8 else None
    for parameter in experts.parameters():
        parameter.data = 0.2 * drawn(*parameter.shape)
    rows_RD, weights_R = drawn(sum(rows), HIDDEN).requires_grad_(), drawn(sum(rows)).requires_grad_()
    weights = DelayedWeightGradients()
    if collects:
        with weights.collect_from_forward():
            out_RD = experts(rows_RD, weights_R, rows)
    else:
        out_RD = experts(rows_RD, weights_R, rows)
    out_RD.backward(drawn(*out_RD.shape))
    weights.flush()
    return [out_RD.detach(), *(x.grad for x in (rows_RD, weights_R, *experts.parameters()) if x.grad is not None)]


@pytest.mark.parametrize("collects", [True, False], ids=["collected", "by autograd"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)], ids=str)
@pytest.mark.parametrize("rows", [(900, 0, 3), (0, 700, 0), (100, 300, 200)], ids=str)
def test_blocks_change_nothing(rows: tuple[int, ...], dtype: torch.dtype, tolerance: float, collects: bool) -> None:
    whole, blocks = (outcome(rows, block, dtype, collects=collects) for block in (None, BLOCK))
    assert len(whole) == len(blocks) == 5
    for ours, theirs in zip(blocks, whole, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_nor_do_they_in_fp8() -> None:
    whole, blocks = (outcome((300, 0, 500), block, torch.bfloat16, fp8=True) for block in (None, BLOCK))
    result, grad_rows, grad_gates, *_ = (torch.equal(*pair) for pair in zip(blocks, whole, strict=True))
    assert result
    assert grad_rows
    assert grad_gates
    for ours, theirs in zip(blocks[3:], whole[3:], strict=True):
        assert (ours - theirs).norm() <= 1e-2 * theirs.norm()  # BF16 sums of blocks


@pytest.mark.parametrize("fp8", [False, True], ids=["native", "fp8"])
def test_between_forward_and_backward_rows_alone_are_kept(fp8: bool) -> None:
    rows = (1000, 24)
    experts = GroupedExperts(2, HIDDEN, INNER)
    experts.block_rows, experts.fp8 = BLOCK, Fp8LinearOps(ReferenceBackend()) if fp8 else None
    for parameter in experts.parameters():
        parameter.data.normal_()
    rows_RD, weights_R = torch.randn(sum(rows), HIDDEN).requires_grad_(), torch.rand(sum(rows))
    with Census() as census:
        out_RD = experts(rows_RD, weights_R, rows)
    kept = census.bytes - out_RD.nbytes
    assert kept == (sum(rows) * (HIDDEN + 4) if fp8 else 0)  # the rows existed before
    del out_RD
    assert census.bytes == 0


def test_without_gradients_blocks_keep_nothing() -> None:
    experts = GroupedExperts(2, HIDDEN, INNER)
    experts.block_rows = BLOCK
    for parameter in experts.parameters():
        parameter.data.normal_()
    with torch.no_grad(), Census() as census:
        out_RD = experts(torch.randn(600, HIDDEN), torch.rand(600), (600, 0))
    assert census.bytes == out_RD.nbytes
