"""Gradients of the global batch: summed over a parameter's replicas, each shard where it is owned, as soon as final.

The loss is already scaled by global counts, so reduction is a sum and never an average.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...comm.async_comm import AsyncCommunicator, AsyncWork
from ...comm.groups import Group
from ...comm.host_transfer import to_host
from ...comm.traffic import TrafficCounter
from .bucket import Bucket

SQUARE_SUM_ELEMENTS = 2**18  # elements: 2 MB in FP64

REDUCE_SCATTER = "reduce_scatter"
ALL_GATHER = "all_gather"


class GradientReducer:
    """Every bucket of one rank, in an order that all ranks agree on, and who is reduced after which instruction.

    A bucket is reduced behind all those before it, also where it is final earlier: ranks that share buckets then
    issue their collectives in one order, and none can wait for another for ever.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        last_use: Sequence[int],
        async_communicator: AsyncCommunicator,
        traffic: TrafficCounter,
    ) -> None:
        """`final_after`: of each bucket, this rank's last instruction that adds to it (`pipeline.uses.last_use`)."""
        self.buckets = tuple(buckets)
        self.async_communicator, self.traffic = async_communicator, traffic
        self._final_after = tuple(last_use)
        self._reducing: list[AsyncWork[None]] = []

    def set_schedule(self, last_use: Sequence[int]) -> None:
        """Another program runs from the next step on. The order of the buckets stays: any will do that all agree on."""
        self._final_after = tuple(last_use)

    def begin_step(self) -> None:
        """Gradients of a new step: zero, also where no token will reach. `traffic` counts a step's bytes from here."""
        self._reducing.clear()
        self.traffic.reset()
        for bucket in self.buckets:
            bucket.grads_N.zero_()

    def after_instruction(self, instruction: int) -> None:
        """This rank has run the instruction of this index: start reducing what is final now."""
        while self._next < len(self.buckets) and self._final_after[self._next] <= instruction:
            self._start(self.buckets[self._next])

    def finish_reduction(self) -> None:
        """Reduce what has not been started, and wait for all of it. Raises `CollectiveError`."""
        while self._next < len(self.buckets):
            self._start(self.buckets[self._next])
        for pending in self._reducing:
            pending.wait()

    def sum_of_squares(self) -> Tensor:
        """The squares of the gradients that this rank owns, summed, after `finish`: FP64, 0-dimensional.

        Each element of the model is owned once, so the root of the sum over all ranks is the gradient's norm.
        """
        return _sum_of_squares([bucket.grad_n for bucket in self.buckets])

    def gradient_norm(self, world: Group) -> float:
        """Collective: the 2-norm over all parameters of the model, equal on all ranks; for callers that sum no more.

        NaN or infinity anywhere makes it NaN or infinite everywhere: one verdict for all.
        """
        total = to_host(world.all_reduce_sum(self.sum_of_squares(), "gradient norm"))
        return float(total.sqrt().item())

    def scale_gradients(self, grad_scale: float) -> None:
        """Multiply the gradients that this rank owns."""
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
    """A rank sends every other rank one shard, in a reduce-scatter the peer's and in an all-gather its own."""
    size = shards_GN[0].nbytes
    traffic.count_payload(operation, group, [0 if peer == group.rank else size for peer in group.ranks])


def _sum_of_squares(shards: Sequence[Tensor]) -> Tensor:
    """FP64, 0-dimensional.

    The FP64 copy is made a piece at a time, in a buffer that stays in a cache: of whole gradients it costs more than
    the optimizer.
    """
    return torch.stack([_squares_of(piece) for shard_n in shards for piece in shard_n.split(SQUARE_SUM_ELEMENTS)]).sum()


def _squares_of(piece: Tensor) -> Tensor:
    wide = piece.double()
    return torch.dot(wide, wide)
