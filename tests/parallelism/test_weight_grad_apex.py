"""Apex's GEMM for weight gradients: when it is called, with a stand-in that checks what Apex requires."""

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch import Tensor

from shoestring.parallelism import weight_grad
from shoestring.parallelism.weight_grad import DelayedWeightGradients, linear

R, K, N = 6, 4, 5


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    weight_grad._gemm.cache_clear()
    yield
    weight_grad._gemm.cache_clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Return the shapes of the calls to Apex, of a module that works on the CPU."""
    recorded: list[torch.Size] = []

    def wgrad_gemm_accum_fp32(x_RK: Tensor, grad_RN: Tensor, sum_NK: Tensor) -> None:
        assert x_RK.dtype == grad_RN.dtype == torch.bfloat16
        assert sum_NK.dtype == torch.float32
        assert all(each.ndim == 2 and each.is_contiguous() for each in (x_RK, grad_RN, sum_NK))
        recorded.extend((x_RK.shape, grad_RN.shape, sum_NK.shape))
        sum_NK += grad_RN.float().T @ x_RK.float()

    module = ModuleType(weight_grad._MODULE)
    module.__spec__ = ModuleSpec(weight_grad._MODULE, None)
    vars(module)["wgrad_gemm_accum_fp32"] = wgrad_gemm_accum_fp32
    monkeypatch.setitem(sys.modules, weight_grad._MODULE, module)
    monkeypatch.setattr(weight_grad, "_DEVICE", "cpu")
    return recorded


def accumulate(dtype: torch.dtype, into: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of a weight after one more product, and that product's factors."""
    x_RK, grad_RN = torch.randn(K, R).T.to(dtype), torch.randn(1, N).expand(R, N).to(dtype)  # as strided as they come
    weight = torch.randn(N, K, dtype=dtype, requires_grad=True)
    weight.grad_dtype = torch.float32
    weight.grad = None if into is None else into.clone()
    left = DelayedWeightGradients()
    with left.collect_from_forward():
        linear(x_RK, weight).backward(grad_RN)
    left.flush()
    assert weight.grad is not None
    return weight.grad, grad_RN, x_RK


def test_bf16_products_are_added_to_an_fp32_sum(calls: list[torch.Size]) -> None:
    before = torch.randn(N, K)
    found, grad_RN, x_RK = accumulate(torch.bfloat16, before)
    assert calls == [(R, K), (R, N), (N, K)]
    torch.testing.assert_close(found, before + grad_RN.float().T @ x_RK.float())  # not rounded to BF16 before


def test_everything_else_goes_the_plain_way(calls: list[torch.Size]) -> None:
    before = torch.randn(N, K)
    strided = torch.randn(K, N).T
    for dtype, into in ((torch.float32, before), (torch.bfloat16, None), (torch.bfloat16, strided)):
        found, grad_RN, x_RK = accumulate(dtype, into)
        product = (grad_RN.T @ x_RK).float()
        torch.testing.assert_close(found, product if into is None else into + product)
    assert not calls


def test_so_does_a_gradient_that_is_on_no_gpu(calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_grad, "_DEVICE", "cuda")
    accumulate(torch.bfloat16, torch.zeros(N, K))
    assert not calls


def test_without_apex_there_is_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_grad, "_DEVICE", "cpu")
    monkeypatch.setitem(sys.modules, weight_grad._MODULE, None)
    before = torch.randn(N, K)
    found, grad_RN, x_RK = accumulate(torch.bfloat16, before)
    torch.testing.assert_close(found, before + (grad_RN.T @ x_RK).float())


def test_what_is_missing_is_reported(calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not list(weight_grad.missing_apex_requirements(on_gpu=True))
    assert list(weight_grad.missing_apex_requirements(on_gpu=False)) == ["it needs a GPU"]
    vars(sys.modules[weight_grad._MODULE]).pop("wgrad_gemm_accum_fp32")
    weight_grad._gemm.cache_clear()
    assert "does not load" in next(weight_grad.missing_apex_requirements(on_gpu=True))
    monkeypatch.delitem(sys.modules, weight_grad._MODULE)
    weight_grad._gemm.cache_clear()
    assert "is not installed" in next(weight_grad.missing_apex_requirements(on_gpu=True))
