"""Replacements, in the process of a rehearsed rank, of functions that need a GPU or a second thread."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from .fake_device import FakeDeviceMode


@contextmanager
def patch_triton_and_threads(device: FakeDeviceMode) -> Iterator[None]:
    """Count Triton's kernels instead of compiling them, and run submitted functions in the calling thread."""

    def count(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        device.record_kernel(f"triton.{kernel.__name__}", tensors)

    with ExitStack() as stack:
        with suppress(ImportError):
            from triton.runtime.jit import JITFunction  # optional package

            stack.enter_context(patch.object(JITFunction, "run", count))
        stack.enter_context(patch.object(torch.cuda, "_lazy_init", lambda: None))
        stack.enter_context(patch.object(ThreadPoolExecutor, "submit", _submit_inline))
        yield


def _submit_inline(pool: ThreadPoolExecutor, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
    """Replace `ThreadPoolExecutor.submit`, since a dispatch mode is active only in the calling thread."""
    future: Future[Any] = Future()
    try:
        future.set_result(function(*args, **kwargs))
    except Exception as error:
        future.set_exception(error)
    return future
