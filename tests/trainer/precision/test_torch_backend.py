"""The torch backend's calls of `scaled_mm`, against a stand-in that checks what torch's source requires."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from shoestring.comm.fp8 import tiles_per_row
from shoestring.trainer.precision.fp8_tensors import Fp8Weight, RowwiseFp8Tensor, ScaleFormat
from shoestring.trainer.precision.reference import ReferenceBackend
from shoestring.trainer.precision.torch_backend import TorchBackend

ROWS = (130, 0, 128, 7)


def stand_in(
    a_MK: Tensor, b_KN: Tensor, scale_a: Tensor, of_a: ScalingType, scale_b: Tensor, of_b: ScalingType,
    output_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Check what ScaledBlas.cpp checks, then multiply with the reference backend."""
    (m, k), n = a_MK.shape, b_KN.shape[1]
    assert a_MK.is_contiguous()
    assert b_KN.T.is_contiguous()
    assert not {m % 16, n % 16, k % 16} - {0}
    assert scale_a.shape == (m, tiles_per_row(k))
    assert of_a == ScalingType.BlockWise1x128
    assert scale_a.stride(0) == 1
    assert scale_a.stride(1) == m or scale_a.shape[1] == 1
    a = RowwiseFp8Tensor(a_MK, scale_a)
    if of_b == ScalingType.BlockWise128x128:
        assert scale_b.shape == (-(-tiles_per_row(k) // 4) * 4, tiles_per_row(n))
        assert scale_b.stride(0) == 1
        assert scale_b.stride(1) == scale_b.shape[0] or scale_b.shape[1] == 1
        return ReferenceBackend().gemm(a, Fp8Weight(b_KN.T, scale_b.T), output_dtype)
    assert of_b == ScalingType.BlockWise1x128
    assert scale_b.shape == (n, tiles_per_row(k))
    assert scale_b.stride(0) == 1
    assert scale_b.stride(1) == n
    return ReferenceBackend().product(a, RowwiseFp8Tensor(b_KN.T, scale_b), output_dtype)


def test_products_are_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "scaled_mm", stand_in)
    ours, reference = TorchBackend(), ReferenceBackend()
    for rows, n, k in ((5, 40, 30), (130, 256, 300)):
        x, w = (
            reference.quantize_rowwise(torch.randn(rows, k), ScaleFormat.FP32),
            reference.quantize_weight(torch.randn(n, k), ScaleFormat.FP32),
        )
        assert torch.equal(ours.gemm(x, w, torch.float32), reference.gemm(x, w, torch.float32))
        grad = reference.quantize_rowwise(torch.randn(rows, n), ScaleFormat.FP32)
        transposed = w.transposed()
        assert torch.equal(
            ours.gemm(grad, transposed, torch.bfloat16), reference.gemm(grad, transposed, torch.bfloat16)
        )
    x_RK, grad_RN = torch.randn(sum(ROWS), 140), torch.randn(sum(ROWS), 200)
    x, w = (
        reference.quantize_rowwise(x_RK, ScaleFormat.FP32),
        reference.quantize_weight(torch.randn(4, 200, 140), ScaleFormat.FP32),
    )
    expected = reference.grouped_gemm(x, w, ROWS, torch.float64)
    assert torch.equal(ours.grouped_gemm(x, w, ROWS, torch.float64), expected)
    columns = [reference.quantize_columnwise(part, ROWS, ScaleFormat.FP32) for part in (grad_RN, x_RK)]
    assert torch.equal(ours.grouped_wgrad_gemm(*columns), reference.grouped_wgrad_gemm(*columns))
