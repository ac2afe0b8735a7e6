"""Transfers between host and device: the only calls of a step in which the host waits for a GPU.

On a CPU they return their argument. For background threads there is pinned memory of exact size, and a reader with a
separate stream.
"""

import mmap
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .streams import DeviceStreams, Stream, StreamEvent
from .units import round_up


def to_host(x: Tensor) -> Tensor:
    """Copy `x` to the host, which waits for the device. `shoestring rehearse` counts these calls."""
    return x.cpu()


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy `x` from the host to `device` without making the host wait."""
    # From pinned memory: CUDA copies pageable memory synchronously.
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


class AsyncHostCopy:
    """A copy of numbers to the host in flight."""

    def __init__(self, numbers: Tensor, arrived: StreamEvent | None, free: list[Tensor]) -> None:
        self._numbers = numbers
        self._arrived = arrived
        self._free = free

    def wait(self) -> Tensor:
        """Wait for the copy and return the numbers."""
        if self._arrived is not None:
            # The event of this copy alone: a synchronization of the stream would wait for all that is queued after it.
            self._arrived.synchronize()
            buffer, self._numbers, self._arrived = self._numbers, self._numbers.clone(), None
            self._free.append(buffer)
        return self._numbers


class AsyncHostCopier:
    """Starts asynchronous copies to the host. Without `streams` tensors are on the host. Not yet run on hardware."""

    def __init__(self, streams: DeviceStreams | None) -> None:
        self._streams = streams
        self._free: defaultdict[tuple[torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)

    def start_copy(self, x: Tensor) -> AsyncHostCopy:
        """Queue a copy of `x` on the current stream."""
        free = self._free[x.shape, x.dtype]
        if self._streams is None:
            return AsyncHostCopy(x, None, free)
        # Buffers are reused: pinning new memory (`cudaHostAlloc`) waits for the whole device.
        buffer = free.pop() if free else torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        buffer.copy_(x, non_blocking=True)
        return AsyncHostCopy(buffer, self._streams.current_stream().record_event(), free)


_PORTABLE = 1
"""`cudaHostRegisterPortable`: pinned for every CUDA context of the process."""


class GrowableHostBuffer:
    """One host buffer that grows on demand and is reused. Pinning is not yet run on hardware."""

    def __init__(self) -> None:
        # Ordinary memory registered with CUDA: torch's allocator of pinned memory rounds up to a power of two, which
        # turns the 2.7 GiB of a rank of DeepSeek-V3 into 4, 32 GiB per node.
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._pinned: int | None = None

    @property
    def tensor(self) -> Tensor:
        """The whole buffer, uint8 [size]."""
        return self._bytes

    def grow(self, size: int, *, pinned: bool) -> None:
        """Grow to at least `size` bytes; a buffer that grows loses its content.

        Raises `RuntimeError` if CUDA cannot pin it.
        """
        if len(self._bytes) >= size:
            return
        self.unpin()
        page = mmap.PAGESIZE
        whole = round_up(size, page)
        # `fill_`: the kernel allocates pages at their first write, which would else slow the first copy. One page more,
        # so that the buffer can start at a page boundary, as registration needs.
        raw = torch.empty(whole + page, dtype=torch.uint8).fill_(0)
        begin = -raw.data_ptr() % page
        self._bytes = raw[begin : begin + whole]
        if pinned:
            self._pin()

    def unpin(self) -> None:
        """Unpin the pages. Required before the memory is freed; no copy may be in flight."""
        if self._pinned is not None:
            _check("cudaHostUnregister", torch.cuda.cudart().cudaHostUnregister(self._pinned))
            self._pinned = None

    def _pin(self) -> None:
        pointer = self._bytes.data_ptr()
        _check("cudaHostRegister", torch.cuda.cudart().cudaHostRegister(pointer, len(self._bytes), _PORTABLE))
        self._pinned = pointer


def _check(call: str, error: Any) -> None:
    if int(error) != 0:
        raise RuntimeError(f"{call} failed with CUDA error {int(error)}: check whether the host has memory to pin")


STAGING_BYTES = 2**26
"""Bytes of both halves of the staging memory: a power of two, to which torch's pinned allocator rounds up."""


class DoubleBufferedReader:
    """Reads a device tensor on the host in slices: one is copied while the caller uses the other.

    Not yet run on hardware.
    """

    def __init__(self, streams: DeviceStreams, name: str, *, pinned: bool, staging_bytes: int = STAGING_BYTES) -> None:
        """Allocate the staging memory; `pinned` needs a GPU."""
        self._streams = streams
        # A separate stream and pinned memory: `Tensor.cpu()` from a thread is a pageable copy on the default stream,
        # which computes. For the 2.7 GB of a rank of DeepSeek-V3 it would stop for an estimated 0.3 to 0.4 s per step.
        self._stream: Stream = streams.create_stream(name)
        self._halves = [torch.empty(staging_bytes // 2, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]

    def record_event(self) -> StreamEvent:
        """Return an event after all work queued on this thread's stream, for `iter_host_slices` to wait for."""
        event: StreamEvent = self._streams.current_stream().record_event()
        return event

    def iter_host_slices(self, flat_N: Tensor, ready: StreamEvent) -> Iterator[tuple[slice, Tensor]]:
        """Yield each slice of `flat_N` in order, with its elements on the host as they are after the event `ready`.

        The elements are overwritten when the next slice but one is requested. `flat_N` must not change or be freed
        before the last slice. The calling thread waits for the copies; the computing stream does not.
        """
        length = self._halves[0].numel() // flat_N.element_size()
        parts = [slice(begin, min(begin + length, len(flat_N))) for begin in range(0, len(flat_N), length)]
        self._stream.wait_event(ready)
        started = [self._copy(flat_N[part], half=0) for part in parts[:1]]
        for number, part in enumerate(parts, start=1):
            host_n, copied = started.pop()
            if number < len(parts):  # into the half that the caller has finished with
                started.append(self._copy(flat_N[parts[number]], half=number % 2))
            copied.synchronize()
            yield part, host_n

    def _copy(self, flat_n: Tensor, half: int) -> tuple[Tensor, StreamEvent]:
        host_n = self._halves[half][: flat_n.nbytes].view(flat_n.dtype)
        with self._streams.use_stream(self._stream):
            host_n.copy_(flat_n, non_blocking=True)
            copied: StreamEvent = self._stream.record_event()
        return host_n, copied
