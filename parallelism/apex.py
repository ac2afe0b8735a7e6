"""Gradients of weights by Apex's GEMM, which adds BF16 products to an FP32 sum. Not yet run on hardware.

Without it a product is rounded to BF16, needs memory of its own, and is added in a pass over both.

Letters: R rows, N and K widths.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

Gemm = Callable[[Tensor, Tensor, Tensor], None]
"""Of x [R, K], grad [R, N] and the sum [N, K], to which it adds gradᵀ x."""

# The package `apex` says nothing: PyPI's is another one, and NVIDIA's may have been built without this.
_MODULE = "fused_weight_gradient_mlp_cuda"
_DEVICE = "cuda"


def missing_for_apex(*, on_gpu: bool) -> Iterator[str]:
    """Why Apex does not add up gradients here; nothing where it does."""
    if importlib.util.find_spec(_MODULE) is None:
        yield f"{_MODULE} is not installed; build NVIDIA's Apex from source with it, or use NVIDIA's PyTorch image"
    elif _gemm() is None:
        yield f"{_MODULE} is installed and does not load; build NVIDIA's Apex again, for this torch"
    if not on_gpu:
        yield "it needs a GPU"


def gemm_for(sum_NK: Tensor, grad_RN: Tensor, x_RK: Tensor) -> Gemm | None:
    """Apex's, where it is installed and takes these tensors."""
    in_bf16 = grad_RN.dtype == x_RK.dtype == torch.bfloat16
    if sum_NK.device.type != _DEVICE or sum_NK.dtype != torch.float32 or not in_bf16:
        return None
    return _gemm() if sum_NK.is_contiguous() else None


@cache
def _gemm() -> Gemm | None:
    try:
        gemm: Gemm = importlib.import_module(_MODULE).wgrad_gemm_accum_fp32
    except (ImportError, AttributeError):
        return None
    return gemm
