"""Memory on the host that GPUs copy into beside their work: pinned at the size that is asked for."""

from __future__ import annotations

import mmap
from typing import Protocol

import torch
from torch import Tensor

_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every CUDA context of the process."""


class Pages(Protocol):
    """What pins pages that are there. Each call returns a CUDA error code, 0 for success."""

    def pin(self, pointer: int, size: int) -> int:
        """Let GPUs copy to and from them while the host goes on."""
        ...

    def unpin(self, pointer: int) -> int:
        """Undo it, for all that was pinned from `pointer` on."""
        ...


class CudaPages:
    """The CUDA runtime, by torch's binding. Not yet run on hardware."""

    def pin(self, pointer: int, size: int) -> int:
        """See `Pages`."""
        return int(torch.cuda.cudart().cudaHostRegister(pointer, size, _PORTABLE))

    def unpin(self, pointer: int) -> int:
        """See `Pages`."""
        return int(torch.cuda.cudart().cudaHostUnregister(pointer))


class HostMemory:
    """One stretch of memory, which grows where more is asked for and is kept. Pinning is not yet run on hardware.

    Torch's allocator of pinned memory rounds up to a power of two: 2.7 GiB of a rank become 4, and 32 of a node are
    lost. So ordinary memory, whole pages of it, is registered with CUDA.
    """

    def __init__(self, pages: Pages | None = None) -> None:
        """`pages`: None for those of CUDA."""
        self._pages = CudaPages() if pages is None else pages
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._pinned: int | None = None

    @property
    def bytes(self) -> Tensor:
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
