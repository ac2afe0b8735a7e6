"""CUDA streams and events behind an interface, so that code for GPUs also runs where something stands in for them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class StreamEvent(Protocol):
    """A point in the work of a stream."""

    def synchronize(self) -> None:
        """Block the host until the stream has reached this point."""
        ...


class Stream(Protocol):
    """A queue of work on a device, executed in order."""

    def record_event(self) -> Any:
        """Return the event that everything queued so far completes."""
        ...

    def wait_event(self, event: Any) -> None:
        """Hold what is queued from here on until `event`. The host does not wait."""
        ...

    def synchronize(self) -> None:
        """Block the host until the queue is empty."""
        ...


class Streams(Protocol):
    """The streams of one device. `CudaStreams` is the real one; tests and `shoestring rehearse` have others."""

    def create(self, name: str) -> Stream:
        """Return a new stream of high priority; `name` says what for."""
        ...

    def current(self) -> Stream:
        """Return the stream that this thread queues work on."""
        ...

    def use(self, stream: Stream) -> AbstractContextManager[object]:
        """Queue this thread's work on `stream` inside the context."""
        ...

    def hold(self, tensor: Tensor, stream: Stream) -> None:
        """Keep the memory of `tensor` from being reused before what is queued on `stream` now has run."""
        ...


@dataclass(frozen=True)
class CudaStreams:
    """Those of torch, for one GPU. Not yet run on hardware."""

    device: torch.device

    def create(self, name: str) -> Stream:
        """See `Streams`."""
        return torch.cuda.Stream(self.device, priority=-1)  # before the products that it feeds

    def current(self) -> Stream:
        """See `Streams`."""
        return torch.cuda.current_stream(self.device)

    def use(self, stream: Stream) -> AbstractContextManager[object]:
        """See `Streams`."""
        assert isinstance(stream, torch.cuda.Stream)
        return torch.cuda.stream(stream)

    def hold(self, tensor: Tensor, stream: Stream) -> None:
        """See `Streams`: the caching allocator's `record_stream`."""
        assert isinstance(stream, torch.cuda.Stream)
        tensor.record_stream(stream)


def streams_of(device: torch.device) -> Streams | None:
    """Return the streams of a GPU; None for a CPU, which has none."""
    return CudaStreams(device) if device.type == "cuda" else None
