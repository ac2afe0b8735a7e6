"""A new file whose bytes go to the disk past the page cache, where the file system can do that.

Through the cache every byte is copied into memory that the kernel must first find, and that nobody reads again: on a
virtual machine it is often the slowest part of a save, and it pushes the corpus out. Past it (O_DIRECT) the disk takes
whole blocks from aligned memory.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np

WRITE_BUFFER_BYTES = 4 * 2**20
"""Bytes of a write: a multiple of any disk's block."""
_PAST_THE_CACHE = getattr(os, "O_DIRECT", 0)


class DirectIOFile:
    """Written once, front to back; use it as a context. On disk when the context ends without error.

    After an `OSError` the file is lost: leave the context.
    """

    def __init__(self, path: Path) -> None:
        """Raises `FileExistsError`. The file system may refuse to be written past the cache; then it is not."""
        self._chunk = mmap.mmap(-1, WRITE_BUFFER_BYTES)  # begins at a page
        self._filled = 0
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with suppress(OSError):  # tmpfs of older kernels, for one
            self._pass_the_cache(True)

    def write(self, raw: bytes | memoryview) -> None:
        """Append `raw`. Raises `OSError`; the disk may only be full at a later call, or at the end."""
        bytes_N = np.frombuffer(raw, np.uint8)
        chunk_C = np.frombuffer(self._chunk, np.uint8)
        while len(bytes_N):
            taken = min(len(bytes_N), WRITE_BUFFER_BYTES - self._filled)
            np.copyto(chunk_C[self._filled : self._filled + taken], bytes_N[:taken])  # while other threads run
            self._filled += taken
            bytes_N = bytes_N[taken:]
            if self._filled == WRITE_BUFFER_BYTES:
                self._empty()

    def __enter__(self) -> DirectIOFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._pass_the_cache(False)  # what is left may be no whole block
                self._empty()
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def _empty(self) -> None:
        left = memoryview(self._chunk)[: self._filled]
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except OSError as error:
                # Its blocks are larger than ours, or a write that was cut short has ended inside of one.
                if error.errno != errno.EINVAL or not self.bypasses_page_cache:
                    raise
                self._pass_the_cache(False)
        self._filled = 0

    @property
    def bypasses_page_cache(self) -> bool:
        """Whether bytes go to the disk past the page cache from here on."""
        return bool(fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & _PAST_THE_CACHE)

    def _pass_the_cache(self, whether: bool) -> None:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & ~_PAST_THE_CACHE
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | (_PAST_THE_CACHE if whether else 0))
