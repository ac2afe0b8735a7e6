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


class DeviceStreams(Protocol):
    """The streams of one device. `CudaStreams` is the real one; tests and `shoestring rehearse` have others."""

    def create_stream(self, name: str) -> Stream:
        """Return a new stream of high priority; `name` says what for."""
        ...

    def current_stream(self) -> Stream:
        """Return the stream that this thread queues work on."""
        ...

    def use_stream(self, stream: Stream) -> AbstractContextManager[object]:
        """Queue this thread's work on `stream` inside the context."""
        ...

    def record_stream(self, tensor: Tensor, stream: Stream) -> None:
        """Keep the memory of `tensor` from being reused before what is queued on `stream` now has run."""
        ...


@dataclass(frozen=True)
class CudaStreams:
    """Those of torch, for one GPU. Not yet run on hardware."""

    device: torch.device

    def create_stream(self, name: str) -> Stream:
        """See `DeviceStreams`."""
        return torch.cuda.Stream(self.device, priority=-1)  # before the products that it feeds

    def current_stream(self) -> Stream:
        """See `DeviceStreams`."""
        return torch.cuda.current_stream(self.device)

    def use_stream(self, stream: Stream) -> AbstractContextManager[object]:
        """See `DeviceStreams`."""
        assert isinstance(stream, torch.cuda.Stream)
        return torch.cuda.stream(stream)

    def record_stream(self, tensor: Tensor, stream: Stream) -> None:
        """See `DeviceStreams`: the caching allocator's `record_stream`."""
        assert isinstance(stream, torch.cuda.Stream)
        tensor.record_stream(stream)


def get_device_streams(device: torch.device) -> DeviceStreams | None:
    """Return the streams of a GPU; None for a CPU, which has none."""
    return CudaStreams(device) if device.type == "cuda" else None
