"""Exponential moving average of the weights, on the CPU and beside the training (report §3.2.3).

An early look at how the model would do after the learning rate has decayed, for no memory or time of a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from ...comm.host_transfer import STAGING_BYTES, DoubleBufferedReader
from ...comm.streams import DeviceStreams, StreamEvent
from ...parallelism.zero.optimizer import ShardedOptimizer


class WeightEMA:
    """The average of the master weights that this rank owns: 4 / d bytes of the host's memory a parameter.

    `start` after a step, `wait` before the next one changes the masters. On a GPU, whose `streams` are given, not yet
    run on hardware.
    """

    def __init__(
        self,
        optimizer: ShardedOptimizer,
        decay: float,
        streams: DeviceStreams | None = None,
        staged_bytes: int = STAGING_BYTES,
    ) -> None:
        """Begin as the weights are. A step keeps `decay` of the average and takes the rest from the weights.

        With `streams`, `staged_bytes` of pinned memory lie between the GPU and the average.
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
        """Make the average what the weights are now."""
        for bucket, shard in zip(self._buckets, self._shards, strict=True):
            shard.copy_(bucket.master_n)

    def start_update(self) -> None:
        """Move the average towards the weights, while the caller goes on with the next step."""
        self.wait()
        updated = None if self._reader is None else self._reader.record_event()
        self._moving = self._thread.submit(self._move, updated)

    def wait(self) -> None:
        """Until the average has moved."""
        if self._moving is not None:
            self._moving.result()
            self._moving = None

    def local_shards(self) -> Iterator[tuple[str, int, Tensor]]:
        """Parameter, offset of a stretch in it when flattened, and the average there, a view; see `bucket.Owned`."""
        self.wait()
        for bucket, shard in zip(self._buckets, self._shards, strict=True):
            for owned in bucket.local_shards():
                yield owned.name, owned.offset, shard[owned.slice_in_bucket_shard]

    @contextmanager
    def swapped_into_model(self) -> Iterator[None]:
        """Collective: inside, the model's weights are the average; afterwards what they were, to the last bit."""
        self.wait()
        kept = [bucket.master_n.clone() for bucket in self._buckets]
        self._replace_masters(self._shards)
        try:
            yield
        finally:
            self._replace_masters(kept)

    @property
    def nbytes(self) -> int:
        """Of the average."""
        return sum(shard.nbytes for shard in self._shards)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    @torch.no_grad()
    def _move(self, updated: StreamEvent | None) -> None:
        """`updated`: when the masters of this step are there; None on a CPU."""
        for bucket, shard in zip(self._buckets, self._shards, strict=True):
            for part, master_n in self._on_host(bucket.master_n, updated):
                shard[part].lerp_(master_n, 1 - self._decay)

    def _on_host(self, master_n: Tensor, updated: StreamEvent | None) -> Iterator[tuple[slice, Tensor]]:
        """In stretches."""
        if self._reader is None:
            yield slice(None), master_n
        else:
            assert updated is not None
            yield from self._reader.iter_host_slices(master_n, updated)

    def _replace_masters(self, shards: list[Tensor]) -> None:
        for bucket, shard in zip(self._buckets, shards, strict=True):
            bucket.master_n.copy_(shard)
        self._optimizer.all_gather_weights()
