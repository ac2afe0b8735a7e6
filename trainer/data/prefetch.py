"""Samples of the next step, read while the current one computes."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class StepPrefetcher(Generic[T]):
    """Reader of what each step needs, one step ahead, in one thread."""

    def __init__(self, read: Callable[[int], T], last_step: int) -> None:
        """Read by `read(step)`, which only this object's thread calls; nothing is read beyond `last_step`."""
        self._read = read
        self._last_step = last_step
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="samples")
        self._ahead: tuple[int, Future[T]] | None = None

    def take(self, step: int) -> T:
        """Return what `step` needs, and begin to read for the next one. Raises what `read` raises."""
        ahead, self._ahead = self._ahead, None
        asked = ahead[1] if ahead is not None and ahead[0] == step else self._thread.submit(self._read, step)
        found = asked.result()
        if step < self._last_step:
            self._ahead = step + 1, self._thread.submit(self._read, step + 1)
        return found

    def close(self) -> None:
        """Stop; what is being read is not waited for."""
        self._thread.shutdown(wait=False, cancel_futures=True)
