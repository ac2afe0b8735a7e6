"""Tensors of a GPU read on the host, beside the training: through pinned memory, on a stream of their own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .streams import Event, Stream, Streams

STAGED_BYTES = 2**26
"""Both halves of the pinned memory. Powers of two, to which torch's allocator of such memory rounds up."""


class StagedReader:
    """Copies one piece to one half of its memory while the caller works on the other. Not yet run on hardware.

    `Tensor.cpu()` from a thread would queue a copy to pageable memory on the default stream, which is the one that
    computes: for the 2.7 GB of a rank of DeepSeek-V3 it would stand still for 0.3 to 0.4 s. Every piece comes in order.
    """

    def __init__(self, streams: Streams, name: str, *, pinned: bool, staged_bytes: int = STAGED_BYTES) -> None:
        """`pinned`: whether there is a GPU to pin memory for."""
        self._streams = streams
        self._stream: Stream = streams.create(name)
        self._halves = [torch.empty(staged_bytes // 2, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]

    def mark(self) -> Event:
        """Return the event that all work queued so far on this thread's stream completes, for `pieces` to wait for."""
        event: Event = self._streams.current().record_event()
        return event

    def pieces(self, flat_N: Tensor, ready: Event) -> Iterator[tuple[slice, Tensor]]:
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

    def _copy(self, flat_n: Tensor, half: int) -> tuple[Tensor, Event]:
        host_n = self._halves[half][: flat_n.nbytes].view(flat_n.dtype)
        with self._streams.use(self._stream):
            host_n.copy_(flat_n, non_blocking=True)
            copied: Event = self._stream.record_event()
        return host_n, copied
