"""Exponential moving average of the weights, kept and updated on the CPU during training (report §3.2.3).

It estimates the model's quality after learning-rate decay early, and takes neither memory nor time of a GPU.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from ...comm.host_transfer import STAGING_BYTES, DoubleBufferedReader
from ...comm.streams import DeviceStreams, StreamEvent
from ...parallelism.zero.optimizer import ShardedOptimizer


class WeightEMA:
    """Average of this rank's shard of the master weights: 4 / d bytes of host memory per parameter.

    Call `start_update` after a step, and `wait` before the next one changes the masters. With `streams`, those of a
    GPU, not yet run on hardware.
    """

    def __init__(
        self,
        optimizer: ShardedOptimizer,
        decay: float,
        streams: DeviceStreams | None = None,
        staged_bytes: int = STAGING_BYTES,
    ) -> None:
        """Start from the present weights. A step keeps `decay` of the average and takes the rest from the weights.

        With `streams`, the masters are copied to the host through `staged_bytes` of pinned memory.
        """
        self._optimizer = optimizer
        self._decay = decay
        self._buckets = optimizer.reducer.buckets
        self._shards = [torch.empty_like(bucket.master_n, device="cpu") for bucket in self._buckets]
        self._reader = None
        if streams is not None:
            pinned = self._buckets[0].master_n.is_cuda
            self._reader = DoubleBufferedReader(streams, "average", pinned=pinned, staging_bytes=staged_bytes)
        self.reset()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="average")
        self._moving: Future[None] | None = None

    def reset(self) -> None:
        """Set the average to the present weights."""
        for bucket, shard in zip(self._buckets, self._shards, strict=True):
            shard.copy_(bucket.master_n)

    def start_update(self) -> None:
        """Start moving the average toward the weights, on a thread, while the next step runs."""
        self.wait()
        updated = None if self._reader is None else self._reader.record_event()
        self._moving = self._thread.submit(self._move, updated)

    def wait(self) -> None:
        """Wait until the average is updated."""
        if self._moving is not None:
            self._moving.result()
            self._moving = None

    def local_shards(self) -> Iterator[tuple[str, int, Tensor]]:
        """Yield parameter name, offset in the flattened parameter, and the average there as a view, for each shard."""
        self.wait()
        for bucket, shard in zip(self._buckets, self._shards, strict=True):
            for owned in bucket.local_shards():
                yield owned.name, owned.offset, shard[owned.slice_in_bucket_shard]

    @contextmanager
    def swapped_into_model(self) -> Iterator[None]:
        """Return a context in which the model's weights are the average; they are restored exactly. Collective."""
        self.wait()
        kept = [bucket.master_n.clone() for bucket in self._buckets]
        self._replace_masters(self._shards)
        try:
            yield
        finally:
            self._replace_masters(kept)

    @property
    def nbytes(self) -> int:
        """Bytes of the average."""
        return sum(shard.nbytes for shard in self._shards)

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown()

    @torch.no_grad()
    def _move(self, updated: StreamEvent | None) -> None:
        """Update the average; `updated` is the event after which the masters are those of this step, None on a CPU."""
        for bucket, shard in zip(self._buckets, self._shards, strict=True):
            for part, master_n in self._on_host(bucket.master_n, updated):
                shard[part].lerp_(master_n, 1 - self._decay)

    def _on_host(self, master_n: Tensor, updated: StreamEvent | None) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of `master_n` on the host, each with its position."""
        if self._reader is None:
            yield slice(None), master_n
        else:
            assert updated is not None
            yield from self._reader.iter_host_slices(master_n, updated)

    def _replace_masters(self, shards: list[Tensor]) -> None:
        for bucket, shard in zip(self._buckets, shards, strict=True):
            bucket.master_n.copy_(shard)
        self._optimizer.all_gather_weights()
