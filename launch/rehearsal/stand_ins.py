"""What cannot run without a GPU or a second thread, replaced in the process of a rehearsed rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ...trainer.model import causal
from .device import RehearsedDevice


@contextmanager
def standing_in(device: RehearsedDevice) -> Iterator[None]:
    """Inside, Triton's kernels are counted instead of compiled, and what other threads would do is done at once."""
    with ExitStack() as stack:
        stack.enter_context(_counting_kernels(device))
        stack.enter_context(patch.object(torch.cuda, "_lazy_init", _nothing))
        stack.enter_context(patch.object(ThreadPoolExecutor, "submit", _at_once))
        stack.enter_context(patch.object(causal, "causal_attention_twin", _cudnn_attention))
        yield


@contextmanager
def _counting_kernels(device: RehearsedDevice) -> Iterator[None]:
    try:
        from triton.runtime.jit import JITFunction  # optional package
    except ImportError:
        yield
        return

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        device.kernel(f"triton.{kernel.__name__}", tensors)

    with patch.object(JITFunction, "run", run):
        yield


def _nothing() -> None:
    """In the place of CUDA's initialization."""


def _at_once(pool: ThreadPoolExecutor, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
    """In the place of `ThreadPoolExecutor.submit`: a thread of its own would not see the rehearsed device."""
    future: Future[Any] = Future()
    try:
        future.set_result(function(*args, **kwargs))
    except Exception as error:
        future.set_exception(error)
    return future


def _cudnn_attention(q_BHSW: Tensor, k_BHSW: Tensor, v_BHSV: Tensor, scale: float) -> Tensor:
    """The kernel that `causal_attention` takes on a Hopper GPU."""
    attention = torch.ops.aten._scaled_dot_product_cudnn_attention
    found: tuple[Tensor, ...] = attention(q_BHSW, k_BHSW, v_BHSV, None, True, 0.0, True, False, scale=scale)
    return found[0]
