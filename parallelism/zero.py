"""ZeRO-1 (arXiv 1910.02054): each rank updates the shard that it owns, and the others get it from there.

The rule of the update is the caller's; here is who updates what, and when.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from ..comm.pending import Pending
from .bucket import Bucket, Owned
from .gradients import ALL_GATHER, Reducer, count_shards


class Update(Protocol):
    """One step of an optimizer on some elements, in place. Each element is updated on its own."""

    def __call__(
        self,
        master_n: Tensor,
        grad_n: Tensor,
        exp_avg_n: Tensor,
        exp_avg_sq_n: Tensor,
        *,
        rate: float,
        step: int,
        decays: bool,
    ) -> None:
        """`step` counts from 1; `decays`: whether weight decay is for these elements."""
        ...


class ShardedOptimizer:
    """Master weights and moments of one rank's shards.

    A step is `reducer.begin`, the backward with `reducer.after` behind each instruction, `reducer.finish` and `norm`,
    then `step` here. Weights may be read after `wait`.
    """

    def __init__(self, reducer: Reducer, update: Update) -> None:
        self.reducer = reducer
        self.steps = 0
        """Taken so far. Whoever loads a state sets it."""
        self._update = update
        self._gathering: list[Pending[None]] = []

    @torch.no_grad()
    def step(self, rate: float, factor: float = 1.0) -> None:
        """Update every owned shard by its gradients times `factor`, and start to hand the weights out."""
        self.steps += 1
        if factor != 1.0:
            self.reducer.scale(factor)
        for bucket in self.reducer.buckets:
            for part, decays in bucket.by_decay():
                state = (bucket.master_n, bucket.grad_n, bucket.exp_avg_n, bucket.exp_avg_sq_n)
                self._update(*(tensor[part] for tensor in state), rate=rate, step=self.steps, decays=decays)
            self._start(bucket)

    def owned(self) -> Iterator[Owned]:
        """The optimizer's state here, parameter by parameter, whatever the layout. Write, `publish`, then train on."""
        for bucket in self.reducer.buckets:
            yield from bucket.owned()

    def publish(self) -> None:
        """Collective: make the weights everywhere what the masters are."""
        for bucket in self.reducer.buckets:
            self._start(bucket)
        self.wait()

    def wait(self) -> None:
        """Until all weights are here. Raises `CollectiveFailed`."""
        while self._gathering:
            self._gathering.pop(0).wait()

    def close(self) -> None:
        """End what runs the collectives."""
        self.reducer.worker.close()

    def _start(self, bucket: Bucket) -> None:
        bucket.take_masters()
        what, gather = f"weights, {bucket.name}", bucket.group.all_gather
        count_shards(self.reducer.traffic, ALL_GATHER, bucket.group, bucket.weights_GN)
        pending = self.reducer.worker.submit(what, lambda: gather(bucket.weights_GN, what), (bucket.weights_N,))
        self._gathering.append(pending)
