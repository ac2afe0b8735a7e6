"""What cannot run without a GPU or a second thread, replaced in the process of a rehearsed rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from .fake_device import FakeDeviceMode


@contextmanager
def patch_triton_and_threads(device: FakeDeviceMode) -> Iterator[None]:
    """Inside, Triton's kernels are counted instead of compiled, and what other threads would do is done at once."""
    with ExitStack() as stack:
        stack.enter_context(_counting_kernels(device))
        stack.enter_context(patch.object(torch.cuda, "_lazy_init", _nothing))
        stack.enter_context(patch.object(ThreadPoolExecutor, "submit", _at_once))
        yield


@contextmanager
def _counting_kernels(device: FakeDeviceMode) -> Iterator[None]:
    try:
        from triton.runtime.jit import JITFunction  # optional package
    except ImportError:
        yield
        return

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        device.record_kernel(f"triton.{kernel.__name__}", tensors)

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
