"""Writer of a new file that bypasses the page cache (O_DIRECT) where the file system supports it.

Through the cache every byte is copied into memory that the kernel must first allocate and that is never read again:
on a virtual machine this is often the slowest part of a save, and it evicts the corpus. With O_DIRECT the disk takes
whole blocks from aligned memory.
"""

import errno
import fcntl
import mmap
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np

WRITE_BUFFER_BYTES = 4 * 2**20
"""Bytes per write, a multiple of any disk's block size."""
_O_DIRECT = getattr(os, "O_DIRECT", 0)


class DirectIOFile:
    """File that is written once, front to back, as a context manager; on disk when the context ends without error.

    After an `OSError` the file is unusable: leave the context.
    """

    def __init__(self, path: Path) -> None:
        """Create the file; use the page cache if the file system refuses O_DIRECT. Raises `FileExistsError`."""
        self._chunk = mmap.mmap(-1, WRITE_BUFFER_BYTES)  # begins at a page
        self._filled = 0
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with suppress(OSError):  # tmpfs of older kernels, for one
            self._set_direct_io(True)

    def write(self, raw: bytes | memoryview) -> None:
        """Append `raw`. Raises `OSError`; a full disk may show only at a later call, or at the end."""
        bytes_N = np.frombuffer(raw, np.uint8)
        chunk_C = np.frombuffer(self._chunk, np.uint8)
        while len(bytes_N):
            taken = min(len(bytes_N), WRITE_BUFFER_BYTES - self._filled)
            np.copyto(chunk_C[self._filled : self._filled + taken], bytes_N[:taken])  # while other threads run
            self._filled += taken
            bytes_N = bytes_N[taken:]
            if self._filled == WRITE_BUFFER_BYTES:
                self._flush_buffer()

    def __enter__(self) -> "DirectIOFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._set_direct_io(False)  # the rest may be no whole block
                self._flush_buffer()
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def _flush_buffer(self) -> None:
        left = memoryview(self._chunk)[: self._filled]
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except OSError as error:
                # The disk's blocks are larger than the buffer, or a short write ended inside a block.
                if error.errno != errno.EINVAL or not self.bypasses_page_cache:
                    raise
                self._set_direct_io(False)
        self._filled = 0

    @property
    def bypasses_page_cache(self) -> bool:
        """True while writes use O_DIRECT."""
        return bool(fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & _O_DIRECT)

    def _set_direct_io(self, enabled: bool) -> None:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & ~_O_DIRECT
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | (_O_DIRECT if enabled else 0))
