"""Delayed weight gradients: a backward computes input gradients first and leaves weight gradients as tasks.

So schedules have separate instructions I and W (zero bubble, arXiv 2401.10241), and a backward can launch its exchange
before its weight gradients (V3 report §3.2.1). Autograd would compute both gradients of y = x Wᵀ together.

Apex's GEMM, where it is installed, adds BF16 products to an FP32 gradient. Not yet run on hardware.

Letters: R rows, N and K widths, T tokens, V vocabulary size, D hidden size.
"""

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
"""Function of x [R, K], grad [R, N] and the sum [N, K], to which it adds gradᵀ x."""

# Not `apex`: PyPI's package of that name is a different project, and NVIDIA's may have been built without this module.
_MODULE = "fused_weight_gradient_mlp_cuda"
_DEVICE = "cuda"


def missing_apex_requirements(*, on_gpu: bool) -> Iterator[str]:
    """Yield each reason why Apex's GEMM is not used here."""
    if importlib.util.find_spec(_MODULE) is None:
        yield f"{_MODULE} is not installed; build NVIDIA's Apex from source with it, or use NVIDIA's PyTorch image"
    elif _gemm() is None:
        yield f"{_MODULE} is installed but does not load; build NVIDIA's Apex again for this torch"
    if not on_gpu:
        yield "it needs a GPU"


def select_apex_gemm(sum_NK: Tensor, grad_RN: Tensor, x_RK: Tensor) -> WgradGemm | None:
    """Return Apex's GEMM if it is installed and supports these tensors, else None."""
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
    """Weight-gradient tasks left by a backward; each adds to the `.grad` of one weight."""

    def __init__(self, *, deferred: bool = False) -> None:
        """Create an empty list of tasks; if `deferred`, only `flush` runs them (instruction W)."""
        self._tasks: deque[WgradTask] = deque()
        self._deferred = deferred

    def add_task(self, task: WgradTask) -> None:
        """Add a task."""
        self._tasks.append(task)

    @property
    def has_work_to_flush(self) -> bool:
        """True if `flush_unless_deferred` would run a task."""
        return bool(self._tasks) and not self._deferred

    def flush_unless_deferred(self) -> None:
        """Flush the pending tasks now that no peer is waiting, unless they are deferred to a W instruction."""
        if not self._deferred:
            self.flush()

    @torch.no_grad()  # recorded by autograd, a gradient would keep its inputs alive
    def flush(self) -> None:
        """Run all tasks in order."""
        while self._tasks:
            self._tasks.popleft()()

    def move_tasks_from(self, other: "DelayedWeightGradients") -> None:
        """Move all tasks of `other` to the end of this list."""
        self._tasks.extend(other._tasks)
        other._tasks.clear()

    @contextmanager
    def collect_from_forward(self) -> Iterator[None]:
        """Collect here the weight gradients of functions whose forward runs inside the context."""
        # The forward remembers its collector, because autograd may run the backward on another thread, where the
        # context variable is not set.
        token = _ACTIVE_COLLECTOR.set(self)
        try:
            yield
        finally:
            _ACTIVE_COLLECTOR.reset(token)


_ACTIVE_COLLECTOR: ContextVar[DelayedWeightGradients | None] = ContextVar("collecting weight gradients", default=None)


def get_active_collector() -> DelayedWeightGradients | None:
    """Return the collector for functions that run forward now; None leaves weight gradients to autograd."""
    return _ACTIVE_COLLECTOR.get()


def accumulate_grad(weight: Tensor, grad: Tensor) -> None:
    """Add to the gradient of a weight in the gradient's dtype, which may be wider than the weight's."""
    if weight.grad is None:
        weight.grad = grad.to(weight.grad_dtype)
    else:
        weight.grad += grad


def linear(x: Tensor, weight_NK: Tensor) -> Tensor:
    """Return x Wᵀ, [..., K] to [..., N], in the dtype of `x`, to which the weight is cast."""
    if get_active_collector() is None or not torch.is_grad_enabled():
        return F.linear(x, weight_NK.to(x.dtype))
    out: Tensor = _Linear.apply(x, weight_NK)  # type: ignore[no-untyped-call]
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        # Not saved: `save_for_backward` would check that the weight is unmodified, and it changes in place only between
        # steps, after the last backward.
        ctx.weight, ctx.left = weight_NK, get_active_collector()
        return F.linear(x, weight_NK.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        (x,), weight_NK = ctx.saved_tensors, ctx.weight
        grad_RN, x_RK = grads[0].flatten(0, -2), x.flatten(0, -2)
        # The task keeps x and the output gradient until it runs: the memory that delaying costs.
        if weight_NK.requires_grad:
            ctx.left.add_task(lambda: accumulate_linear_wgrad(weight_NK, grad_RN, x_RK))
        if not ctx.needs_input_grad[0]:
            return None, None
        return (grad_RN @ weight_NK.to(grad_RN.dtype)).view(x.shape), None


def accumulate_linear_wgrad(weight_NK: Tensor, grad_RN: Tensor, x_RK: Tensor) -> None:
    """Add gradᵀ x to the gradient of a weight."""
    # One GEMM that also accumulates, where there is one. Without Apex a BF16 product is rounded to BF16, needs memory
    # of the size of the weight, and is added in a second pass.
    sum_NK = weight_NK.grad
    if sum_NK is not None and sum_NK.dtype == grad_RN.dtype:
        sum_NK.addmm_(grad_RN.T, x_RK)
    elif sum_NK is not None and (gemm := select_apex_gemm(sum_NK, grad_RN, x_RK)) is not None:
        gemm(x_RK.contiguous(), grad_RN.contiguous(), sum_NK)
    else:
        accumulate_grad(weight_NK, grad_RN.T @ x_RK)


def embedding(tokens: Tensor, weight_VD: Tensor) -> Tensor:
    """Look up rows of the weight, int64 [...] to [..., D]; gradients are summed in the gradient's dtype."""
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
    """Add the sum of the rows of `grad_TD` with the same token to the row of that token in the embedding's gradient."""
    # Only rows of these tokens are touched: a dense gradient is as large as the table, 3.7 GB for DeepSeek-V3. The rows
    # of a token are summed first, so that `index_add_` adds to each row of the table once (but for zeros): the bits do
    # not depend on the order of its atomic additions.
    if weight_VD.grad is None:
        weight_VD.grad = torch.zeros_like(weight_VD, dtype=weight_VD.grad_dtype)
    sorted_T, order_T = tokens_T.sort(stable=True)
    is_first_T = torch.ones_like(sorted_T)
    is_first_T[1:] = sorted_T[1:] != sorted_T[:-1]
    group_T = is_first_T.cumsum(0) - 1  # distinct tokens are numbered in ascending order: at most T
    number_T = torch.empty_like(group_T).scatter_(0, order_T, group_T)
    token_T = torch.zeros_like(group_T).scatter_(0, group_T, sorted_T)  # unused numbers have rows of zero
    wide_TD = grad_TD.to(weight_VD.grad_dtype)
    sums_TD: Tensor = torch.ops.aten.embedding_dense_backward(wide_TD, number_T, len(tokens_T), -1, False)
    weight_VD.grad.index_add_(0, token_T, sums_TD)
