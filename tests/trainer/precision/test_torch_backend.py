"""What the torch provider hands to `scaled_mm`, before a stand-in that demands what torch's source demands."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from shoestring.comm.fp8 import tiles_of
from shoestring.trainer.precision.reference import Reference
from shoestring.trainer.precision.tiles import Blocks, Scales, Tiles
from shoestring.trainer.precision.torch_backend import TorchBackend

ROWS = (130, 0, 128, 7)


def stand_in(
    a_MK: Tensor, b_KN: Tensor, scale_a: Tensor, of_a: ScalingType, scale_b: Tensor, of_b: ScalingType,
    output_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The checks of ScaledBlas.cpp, then the product by the reference provider."""
    (m, k), n = a_MK.shape, b_KN.shape[1]
    assert a_MK.is_contiguous()
    assert b_KN.T.is_contiguous()
    assert not {m % 16, n % 16, k % 16} - {0}
    assert scale_a.shape == (m, tiles_of(k))
    assert of_a == ScalingType.BlockWise1x128
    assert scale_a.stride(0) == 1
    assert scale_a.stride(1) == m or scale_a.shape[1] == 1
    a = Tiles(a_MK, scale_a)
    if of_b == ScalingType.BlockWise128x128:
        assert scale_b.shape == (-(-tiles_of(k) // 4) * 4, tiles_of(n))
        assert scale_b.stride(0) == 1
        assert scale_b.stride(1) == scale_b.shape[0] or scale_b.shape[1] == 1
        return Reference().multiply(a, Blocks(b_KN.T, scale_b.T), output_dtype)
    assert of_b == ScalingType.BlockWise1x128
    assert scale_b.shape == (n, tiles_of(k))
    assert scale_b.stride(0) == 1
    assert scale_b.stride(1) == n
    return Reference()._product(a, Tiles(b_KN.T, scale_b)).to(output_dtype)


def test_products_are_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "scaled_mm", stand_in)
    ours, twin = TorchBackend(), Reference()
    for rows, n, k in ((5, 40, 30), (130, 256, 300)):
        x, w = twin.tiles(torch.randn(rows, k), Scales.FP32), twin.blocks(torch.randn(n, k), Scales.FP32)
        assert torch.equal(ours.multiply(x, w, torch.float32), twin.multiply(x, w, torch.float32))
        grad = twin.tiles(torch.randn(rows, n), Scales.FP32)
        turned = w.transposed()
        assert torch.equal(ours.multiply(grad, turned, torch.bfloat16), twin.multiply(grad, turned, torch.bfloat16))
    x_RK, grad_RN = torch.randn(sum(ROWS), 140), torch.randn(sum(ROWS), 200)
    x, w = twin.tiles(x_RK, Scales.FP32), twin.blocks(torch.randn(4, 200, 140), Scales.FP32)
    expected = twin.multiply_grouped(x, w, ROWS, torch.float64)
    assert torch.equal(ours.multiply_grouped(x, w, ROWS, torch.float64), expected)
    columns = [twin.columns(part, ROWS, Scales.FP32) for part in (grad_RN, x_RK)]
    assert torch.equal(ours.outer(*columns), twin.outer(*columns))
