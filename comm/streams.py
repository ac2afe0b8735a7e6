"""Interface of CUDA streams and events, which tests and `shoestring rehearse` implement without a GPU."""

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
        """Return an event after everything queued so far."""
        ...

    def wait_event(self, event: Any) -> None:
        """Make later work of this stream wait for `event`. The host does not wait."""
        ...

    def synchronize(self) -> None:
        """Block the host until the queue is empty."""
        ...


class DeviceStreams(Protocol):
    """Streams of one device. `CudaStreams` is the real implementation."""

    def create_stream(self, name: str) -> Stream:
        """Return a new high-priority stream called `name`."""
        ...

    def current_stream(self) -> Stream:
        """Return the stream that this thread queues work on."""
        ...

    def use_stream(self, stream: Stream) -> AbstractContextManager[object]:
        """Return a context in which this thread queues its work on `stream`."""
        ...

    def record_stream(self, tensor: Tensor, stream: Stream) -> None:
        """Delay the reuse of the memory of `tensor` until the work now queued on `stream` has run."""
        ...


@dataclass(frozen=True)
class CudaStreams:
    """torch's streams of one GPU. Not yet run on hardware."""

    device: torch.device

    def create_stream(self, name: str) -> Stream:
        """See `DeviceStreams`."""
        # High priority: blocks of a communication kernel are scheduled before those of the products that wait for it.
        return torch.cuda.Stream(self.device, priority=-1)

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
