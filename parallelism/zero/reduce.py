"""Reduce-scatter of gradients, bucket by bucket, as soon as they are final."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...comm.async_comm import AsyncCommunicator, AsyncWork
from ...comm.groups import Group
from ...comm.host_transfer import to_host
from ...comm.traffic import TrafficCounter, TrafficKind
from .bucket import Bucket

# Elements of a piece in a sum of squares: 2 MB in FP64, which stays in a cache. An FP64 copy of whole gradients would
# cost more time than the optimizer.
SQUARE_SUM_ELEMENTS = 2**18

REDUCE_SCATTER = "reduce_scatter"
ALL_GATHER = "all_gather"


class GradientReducer:
    """Starts the reduction of each bucket of one rank after the last instruction that adds to it.

    The order of the buckets must be the same on all ranks that share them. Gradients are summed, never averaged: the
    loss is scaled by global counts.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        last_use: Sequence[int],
        async_communicator: AsyncCommunicator,
        traffic: TrafficCounter,
    ) -> None:
        """Take for each bucket this rank's last instruction that adds to it (`liveness.last_use`)."""
        self.buckets = tuple(buckets)
        self.async_communicator, self.traffic = async_communicator, traffic
        self._last_use = tuple(last_use)
        self._reducing: list[AsyncWork[None]] = []

    def set_schedule(self, last_use: Sequence[int]) -> None:
        """Set the last use of each bucket in the program of the next step; the order of the buckets stays."""
        self._last_use = tuple(last_use)

    def begin_step(self) -> None:
        """Set the gradients and the traffic counter to zero."""
        # All gradients: an expert without tokens in this step adds nothing, and its old gradient must not remain.
        self._reducing.clear()
        self.traffic.reset()
        for bucket in self.buckets:
            bucket.grads_N.zero_()

    def after_instruction(self, instruction: int) -> None:
        """Start the reduction of buckets that are final after `instruction`."""
        # In order: a bucket waits for those before it, also if it is final earlier. Ranks that share buckets then issue
        # their collectives in one order, without which two ranks could wait for each other.
        while self._next < len(self.buckets) and self._last_use[self._next] <= instruction:
            self._start(self.buckets[self._next])

    def finish_reduction(self) -> None:
        """Start the remaining reductions and wait for all. Raises `CollectiveError`."""
        while self._next < len(self.buckets):
            self._start(self.buckets[self._next])
        for pending in self._reducing:
            pending.wait()

    def sum_of_squares(self) -> Tensor:
        """Return the sum of squares of the local gradient shards after `finish_reduction`: FP64, 0-dimensional.

        Each element of the model is in one shard, so the root of the sum over all ranks is the gradient norm.
        """
        return _sum_of_squares([bucket.grad_n for bucket in self.buckets])

    def gradient_norm(self, world: Group) -> float:
        """Return the 2-norm of the gradients of all parameters of the model, equal on all ranks. Collective.

        NaN or infinity on one rank makes it NaN or infinite on all, so that all decide alike.
        """
        total = to_host(world.all_reduce_sum(self.sum_of_squares(), "gradient norm"))
        return float(total.sqrt().item())

    def scale_gradients(self, grad_scale: float) -> None:
        """Multiply the local gradient shards by `grad_scale`."""
        for bucket in self.buckets:
            bucket.grad_n.mul_(grad_scale)

    @property
    def _next(self) -> int:
        return len(self._reducing)

    def _start(self, bucket: Bucket) -> None:
        what = f"sum of gradients, {bucket.name}"
        count_shard_traffic(self.traffic, REDUCE_SCATTER, bucket.group, bucket.grads_GN)
        reduce = bucket.group.reduce_scatter_sum
        self._reducing.append(
            self.async_communicator.submit(what, lambda: reduce(bucket.grads_GN, what), (bucket.grads_N,))
        )


def count_shard_traffic(traffic: TrafficCounter, operation: str, group: Group, shards_GN: Tensor) -> None:
    """Count one shard to every other rank: in a reduce-scatter the peer's shard, in an all-gather the local one."""
    size = shards_GN[0].nbytes
    traffic.count(operation, TrafficKind.PAYLOAD, group, [0 if peer == group.rank else size for peer in group.ranks])


def _sum_of_squares(shards: Sequence[Tensor]) -> Tensor:
    """Return the sum of squares in FP64, 0-dimensional."""
    return torch.stack([_squares_of(piece) for shard_n in shards for piece in shard_n.split(SQUARE_SUM_ELEMENTS)]).sum()


def _squares_of(piece: Tensor) -> Tensor:
    wide = piece.double()
    return torch.dot(wide, wide)
