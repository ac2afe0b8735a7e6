"""Transfers between host and device. In a step nothing else makes the host wait for a GPU.

On a CPU the two ways of a step, `to_device` and reading on the host, return what they are given. For threads beside the
training there are pinned pages of exactly the size that is asked for, and a reader with a stream of its own.
"""

from __future__ import annotations

import mmap
from collections import defaultdict
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from .streams import DeviceStreams, Stream, StreamEvent


def to_host(x: Tensor) -> Tensor:
    """`x` where Python can look at it. The host waits for the device: a step has few of these, and they are counted."""
    return x.cpu()


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x`, which is on the host, on `device`. From pinned memory, so that the host does not wait."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


class AsyncHostCopy:
    """Numbers on their way to the host."""

    def __init__(self, numbers: Tensor, arrived: StreamEvent | None, free: list[Tensor]) -> None:
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


class AsyncHostCopier:
    """Starts copies to the host that it does not wait for: through pinned buffers, each with an event.

    Buffers are used again, because pinning new memory (`cudaHostAlloc`) waits for the whole device. Without `streams`
    the tensors are on the host already. Not yet run on hardware.
    """

    def __init__(self, streams: DeviceStreams | None) -> None:
        self._streams = streams
        self._free: defaultdict[tuple[torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)

    def start_copy(self, x: Tensor) -> AsyncHostCopy:
        """Queue a copy of `x` on the current stream."""
        free = self._free[x.shape, x.dtype]
        if self._streams is None:
            return AsyncHostCopy(x, None, free)
        buffer = free.pop() if free else torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        buffer.copy_(x, non_blocking=True)
        return AsyncHostCopy(buffer, self._streams.current_stream().record_event(), free)


_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every CUDA context of the process."""


class PagePinner(Protocol):
    """What pins pages that are there. Each call returns a CUDA error code, 0 for success."""

    def pin(self, pointer: int, size: int) -> int:
        """Let GPUs copy to and from them while the host goes on."""
        ...

    def unpin(self, pointer: int) -> int:
        """Undo it, for all that was pinned from `pointer` on."""
        ...


class CudaPagePinner:
    """The CUDA runtime, by torch's binding. Not yet run on hardware."""

    def pin(self, pointer: int, size: int) -> int:
        """See `PagePinner`."""
        return int(torch.cuda.cudart().cudaHostRegister(pointer, size, _PORTABLE))

    def unpin(self, pointer: int) -> int:
        """See `PagePinner`."""
        return int(torch.cuda.cudart().cudaHostUnregister(pointer))


class GrowableHostBuffer:
    """One stretch of memory, which grows where more is asked for and is kept. Pinning is not yet run on hardware.

    Torch's allocator of pinned memory rounds up to a power of two: 2.7 GiB of a rank become 4, and 32 of a node are
    lost. So ordinary memory, whole pages of it, is registered with CUDA.
    """

    def __init__(self, pinner: PagePinner | None = None) -> None:
        """`pages`: None for those of CUDA."""
        self._pages = CudaPagePinner() if pinner is None else pinner
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._pinned: int | None = None

    @property
    def tensor(self) -> Tensor:
        """[size] of uint8: all of it."""
        return self._bytes

    def grow(self, size: int, *, pinned: bool) -> None:
        """Have at least `size` bytes. What they held is lost where they are new; then their pages are there.

        Raises `RuntimeError` where CUDA does not pin them.
        """
        if len(self._bytes) >= size:
            return
        self.unpin()
        page = mmap.PAGESIZE
        whole = -(-size // page) * page
        raw = torch.empty(whole + page, dtype=torch.uint8).fill_(0)  # the kernel gives pages when they are written
        begin = -raw.data_ptr() % page
        self._bytes = raw[begin : begin + whole]
        if pinned:
            self._pin()

    def unpin(self) -> None:
        """Take the pages back from CUDA, as has to be done before the memory is freed; no copy may be under way."""
        if self._pinned is not None:
            _check("cudaHostUnregister", self._pages.unpin(self._pinned))
            self._pinned = None

    def _pin(self) -> None:
        pointer = self._bytes.data_ptr()
        _check("cudaHostRegister", self._pages.pin(pointer, len(self._bytes)))
        self._pinned = pointer


def _check(call: str, error: int) -> None:
    if error != 0:
        raise RuntimeError(f"{call} failed with the CUDA error {error}: look whether the host has memory to pin")


STAGING_BYTES = 2**26
"""Both halves of the pinned memory. Powers of two, to which torch's allocator of such memory rounds up."""


class DoubleBufferedReader:
    """Copies one piece to one half of its memory while the caller works on the other. Not yet run on hardware.

    `Tensor.cpu()` from a thread would queue a copy to pageable memory on the default stream, which is the one that
    computes: for the 2.7 GB of a rank of DeepSeek-V3 it would stand still for 0.3 to 0.4 s. Every piece comes in order.
    """

    def __init__(self, streams: DeviceStreams, name: str, *, pinned: bool, staging_bytes: int = STAGING_BYTES) -> None:
        """`pinned`: whether there is a GPU to pin memory for."""
        self._streams = streams
        self._stream: Stream = streams.create_stream(name)
        self._halves = [torch.empty(staging_bytes // 2, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]

    def record_event(self) -> StreamEvent:
        """Return the event that all work queued so far on this thread's stream completes, for `pieces` to wait for."""
        event: StreamEvent = self._streams.current_stream().record_event()
        return event

    def iter_host_slices(self, flat_N: Tensor, ready: StreamEvent) -> Iterator[tuple[slice, Tensor]]:
        """Yield each stretch of `flat_N` and its elements on the host, as they are once `ready` has come.

        The elements are overwritten when the next but one stretch is asked for. Nothing may write to `flat_N`, or free
        it, before the last one has come. The thread that asks waits for the copies; the computing stream does not.
        """
        length = self._halves[0].numel() // flat_N.element_size()
        parts = [slice(begin, min(begin + length, len(flat_N))) for begin in range(0, len(flat_N), length)]
        self._stream.wait_event(ready)
        started = [self._copy(flat_N[part], half=0) for part in parts[:1]]
        for number, part in enumerate(parts, start=1):
            host_n, copied = started.pop()
            if number < len(parts):  # into the half that the caller has done with
                started.append(self._copy(flat_N[parts[number]], half=number % 2))
            copied.synchronize()
            yield part, host_n

    def _copy(self, flat_n: Tensor, half: int) -> tuple[Tensor, StreamEvent]:
        host_n = self._halves[half][: flat_n.nbytes].view(flat_n.dtype)
        with self._streams.use_stream(self._stream):
            host_n.copy_(flat_n, non_blocking=True)
            copied: StreamEvent = self._stream.record_event()
        return host_n, copied
