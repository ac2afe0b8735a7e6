"""The ways between host and device. In a step nothing else makes the host wait for a GPU.

On a CPU all of them return what they are given.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from .streams import Event, Streams


def to_host(x: Tensor) -> Tensor:
    """`x` where Python can look at it. The host waits for the device: a step has few of these, and they are counted."""
    return x.cpu()


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x`, which is on the host, on `device`. From pinned memory, so that the host does not wait."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


class HostCopy:
    """Numbers on their way to the host."""

    def __init__(self, numbers: Tensor, arrived: Event | None, free: list[Tensor]) -> None:
        self._numbers = numbers
        self._arrived = arrived
        self._free = free

    def wait(self) -> Tensor:
        """Return the numbers. The host waits until they have arrived, and not for what was queued behind them."""
        if self._arrived is not None:
            self._arrived.synchronize()
            buffer, self._numbers, self._arrived = self._numbers, self._numbers.clone(), None
            self._free.append(buffer)
        return self._numbers


class HostCopies:
    """Starts copies to the host that it does not wait for: through pinned buffers, each with an event.

    Buffers are used again, because pinning new memory (`cudaHostAlloc`) waits for the whole device. Without `streams`
    the tensors are on the host already. Not yet run on hardware.
    """

    def __init__(self, streams: Streams | None) -> None:
        self._streams = streams
        self._free: defaultdict[tuple[torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)

    def start(self, x: Tensor) -> HostCopy:
        """Queue a copy of `x` on the current stream."""
        free = self._free[x.shape, x.dtype]
        if self._streams is None:
            return HostCopy(x, None, free)
        buffer = free.pop() if free else torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        buffer.copy_(x, non_blocking=True)
        return HostCopy(buffer, self._streams.current().record_event(), free)
