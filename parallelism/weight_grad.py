"""Gradients of inputs and of weights, apart: the first are what others wait for, the second can be put off.

A product y = x Wᵀ has two gradients, of x and of W, each a product of its own. Autograd would run both at once. Here a
function that multiplies by a weight computes the gradient of x in its backward and leaves that of W as work for later,
with whoever was collecting when it ran forward. So schedules have separate instructions I and W (zero bubble,
arXiv 2401.10241), and a backward can launch its exchange before it turns to weights (V3 report §3.2.1).

Where Apex is installed, its GEMM adds BF16 products to an FP32 gradient; without it a product is rounded to BF16, needs
memory of its own, and is added in a pass over both. Apex's GEMM is not yet run on hardware.

Letters: R rows, N and K widths.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WgradGemm = Callable[[Tensor, Tensor, Tensor], None]
"""Of x [R, K], grad [R, N] and the sum [N, K], to which it adds gradᵀ x."""

# The package `apex` says nothing: PyPI's is another one, and NVIDIA's may have been built without this.
_MODULE = "fused_weight_gradient_mlp_cuda"
_DEVICE = "cuda"


def missing_apex_requirements(*, on_gpu: bool) -> Iterator[str]:
    """Why Apex does not add up gradients here; nothing where it does."""
    if importlib.util.find_spec(_MODULE) is None:
        yield f"{_MODULE} is not installed; build NVIDIA's Apex from source with it, or use NVIDIA's PyTorch image"
    elif _gemm() is None:
        yield f"{_MODULE} is installed and does not load; build NVIDIA's Apex again, for this torch"
    if not on_gpu:
        yield "it needs a GPU"


def select_apex_gemm(sum_NK: Tensor, grad_RN: Tensor, x_RK: Tensor) -> WgradGemm | None:
    """Apex's, where it is installed and takes these tensors."""
    in_bf16 = grad_RN.dtype == x_RK.dtype == torch.bfloat16
    if sum_NK.device.type != _DEVICE or sum_NK.dtype != torch.float32 or not in_bf16:
        return None
    return _gemm() if sum_NK.is_contiguous() else None


@cache
def _gemm() -> WgradGemm | None:
    try:
        gemm: WgradGemm = importlib.import_module(_MODULE).wgrad_gemm_accum_fp32
    except (ImportError, AttributeError):
        return None
    return gemm


WgradTask = Callable[[], None]


class DelayedWeightGradients:
    """Work that remains after a backward of inputs: each piece adds to the `.grad` of one weight."""

    def __init__(self, *, deferred: bool = False) -> None:
        """`deferred`: all of it waits until `run`."""
        self._work: deque[WgradTask] = deque()
        self._deferred = deferred

    def add_task(self, work: WgradTask) -> None:
        """Leave a piece of work."""
        self._work.append(work)

    @property
    def has_work_to_flush(self) -> bool:
        """Whether `settle` has something to do."""
        return bool(self._work) and not self._deferred

    def flush_unless_deferred(self) -> None:
        """A moment at which others wait for nothing from here: do what has been left, unless it is deferred."""
        if not self._deferred:
            self.flush()

    @torch.no_grad()
    def flush(self) -> None:
        """Do all that has been left, in that order. Recorded by autograd, a gradient would keep its inputs alive."""
        while self._work:
            self._work.popleft()()

    def move_tasks_from(self, other: DelayedWeightGradients) -> None:
        """Append everything that `other` holds."""
        self._work.extend(other._work)
        other._work.clear()

    @contextmanager
    def collect_from_forward(self) -> Iterator[None]:
        """Functions that run forward inside leave the gradients of their weights here when their backward runs.

        It is the forward that remembers where: autograd may run a backward on a thread of its own.
        """
        token = _COLLECTING.set(self)
        try:
            yield
        finally:
            _COLLECTING.reset(token)


_COLLECTING: ContextVar[DelayedWeightGradients | None] = ContextVar("collecting weight gradients", default=None)


def get_active_collector() -> DelayedWeightGradients | None:
    """Where a function that runs forward now should leave the gradients of its weights; None: with autograd."""
    return _COLLECTING.get()


def accumulate_grad(weight: Tensor, grad: Tensor) -> None:
    """Add to the gradient of a weight, in the gradient's dtype, which may be wider than the weight's."""
    if weight.grad is None:
        weight.grad = grad.to(weight.grad_dtype)
    else:
        weight.grad += grad


def linear(x: Tensor, weight_NK: Tensor) -> Tensor:
    """x Wᵀ, [..., K] to [..., N], in the dtype of `x`; the weight is cast at its use."""
    if get_active_collector() is None or not torch.is_grad_enabled():
        return F.linear(x, weight_NK.to(x.dtype))
    out: Tensor = _Linear.apply(x, weight_NK)  # type: ignore[no-untyped-call]
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        # Kept as it is, not saved: a weight changes in place between steps only, after the last backward.
        ctx.weight, ctx.left = weight_NK, get_active_collector()
        return F.linear(x, weight_NK.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        (x,), weight_NK = ctx.saved_tensors, ctx.weight
        grad_RN, x_RK = grads[0].flatten(0, -2), x.flatten(0, -2)
        if weight_NK.requires_grad:
            ctx.left.add_task(lambda: accumulate_linear_wgrad(weight_NK, grad_RN, x_RK))
        if not ctx.needs_input_grad[0]:
            return None, None
        return (grad_RN @ weight_NK.to(grad_RN.dtype)).view(x.shape), None


def accumulate_linear_wgrad(weight_NK: Tensor, grad_RN: Tensor, x_RK: Tensor) -> None:
    """Add gradᵀ x to the gradient of a weight; where one GEMM can do both, without a pass of its own over it."""
    sum_NK = weight_NK.grad
    if sum_NK is not None and sum_NK.dtype == grad_RN.dtype:
        sum_NK.addmm_(grad_RN.T, x_RK)
    elif sum_NK is not None and (gemm := select_apex_gemm(sum_NK, grad_RN, x_RK)) is not None:
        gemm(x_RK.contiguous(), grad_RN.contiguous(), sum_NK)
    else:
        accumulate_grad(weight_NK, grad_RN.T @ x_RK)


def embedding(tokens: Tensor, weight_VD: Tensor) -> Tensor:
    """Rows of the weight, int64 [...] to [..., D]. Gradients of one token's rows are summed in the gradient's dtype."""
    if get_active_collector() is None or not torch.is_grad_enabled():
        return F.embedding(tokens, weight_VD)
    out: Tensor = _Embedding.apply(tokens, weight_VD)  # type: ignore[no-untyped-call]
    return out


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.tokens, ctx.weight, ctx.left = tokens, weight_VD, get_active_collector()
        return F.embedding(tokens, weight_VD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        tokens, weight_VD, (grad,) = ctx.tokens, ctx.weight, grads
        ctx.left.add_task(lambda: accumulate_embedding_wgrad(weight_VD, tokens.flatten(), grad.flatten(0, -2)))
        return None, None


def accumulate_embedding_wgrad(weight_VD: Tensor, tokens_T: Tensor, grad_TD: Tensor) -> None:
    """Add each row of `grad_TD` to the row of its token in the gradient of the table, as one sum of each token's rows.

    Only rows of these tokens are touched: a dense sum would be as large as the table, 3.7 GB for DeepSeek-V3. Bits do
    not depend on the order of atomic additions, since each row is added to once but for sums of nothing.
    """
    if weight_VD.grad is None:
        weight_VD.grad = torch.zeros_like(weight_VD, dtype=weight_VD.grad_dtype)
    sorted_T, order_T = tokens_T.sort(stable=True)
    is_first_T = torch.ones_like(sorted_T)
    is_first_T[1:] = sorted_T[1:] != sorted_T[:-1]
    group_T = is_first_T.cumsum(0) - 1  # tokens are numbered as they are met in order: at most T of them
    number_T = torch.empty_like(group_T).scatter_(0, order_T, group_T)
    token_T = torch.zeros_like(group_T).scatter_(0, group_T, sorted_T)  # numbers that are left have rows of zero
    wide_TD = grad_TD.to(weight_VD.grad_dtype)
    sums_TD: Tensor = torch.ops.aten.embedding_dense_backward(wide_TD, number_T, len(tokens_T), -1, False)
    weight_VD.grad.index_add_(0, token_T, sums_TD)
