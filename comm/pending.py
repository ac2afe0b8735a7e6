"""Communication that advances without being waited on: one worker thread a rank, in the order of submission."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

import torch

T = TypeVar("T")
Result = TypeVar("Result", covariant=True)


class Pending(Protocol[Result]):
    """A communication under way."""

    def wait(self) -> Result:
        """Block until it is done and return what arrived. An error in the communication is raised here."""
        ...


class Done(Generic[T]):
    """A result that is already here."""

    def __init__(self, result: T) -> None:
        self._result = result

    def wait(self) -> T:
        """Return the result."""
        return self._result


class _Submitted(Generic[T]):
    def __init__(self, future: Future[T]) -> None:
        self._future = future

    def wait(self) -> T:
        return self._future.result()


class Worker:
    """Runs whole exchanges, one after the other, beside the computing thread.

    gloo has no streams: a thread of its own is what lets an exchange of several collectives advance while the main
    thread computes. One thread, first in first out: all ranks of a group issue their collectives in one order, so none
    can wait for another for ever.
    On a GPU the collectives are asynchronous already and `submit` runs the function at once, in the caller.
    """

    def __init__(self, *, threaded: bool) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="exchange") if threaded else None

    def submit(self, function: Callable[[], T]) -> Pending[T]:
        """Start `function`, which sees no autograd."""

        def without_autograd() -> T:
            with torch.no_grad():
                return function()

        if self._executor is None:
            return Done(without_autograd())
        return _Submitted(self._executor.submit(without_autograd))

    def close(self) -> None:
        """Let what was submitted finish, then end the thread."""
        if self._executor is not None:
            self._executor.shutdown()
