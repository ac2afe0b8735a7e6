"""A collective that did not come to its end: who waited, in what, for whom."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta


class CollectiveFailed(RuntimeError):  # noqa: N818 -- says what happened
    """A peer died, a link went silent for longer than the limit, or the ranks disagree on what they are doing."""


@contextmanager
def failing_clearly(rank: int, what: object, peers: Sequence[int], limit: timedelta) -> Iterator[None]:
    """Turn what the backend raises into `CollectiveFailed`, which names rank, operation, peers and limit."""
    began = time.monotonic()
    try:
        yield
    except CollectiveFailed:
        raise
    except RuntimeError as error:
        seconds = time.monotonic() - began
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        others = ", ".join(str(peer) for peer in peers if peer != rank)
        message = f"rank {rank}: {what} with ranks {others} failed after {seconds:.1f} s"
        raise CollectiveFailed(f"{message} (limit {limit.total_seconds():g} s): {reason}") from error
