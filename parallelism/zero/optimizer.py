"""ZeRO-1 (arXiv 1910.02054): each rank updates the shard that it owns, and the others get it from there.

The rule of the update is the caller's; here is who updates what, and when.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...comm.async_comm import AsyncWork
from ...comm.trace import GRADIENT_SYNC_WAIT, SpanRecorder, TimelineTrack
from .bucket import ParameterShard
from .reduce import ALL_GATHER, GradientReducer, count_shard_traffic


class OptimizerUpdate(Protocol):
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

    A step is `reducer.begin`, the backward with `after` behind each instruction, `reducer.finish` and `norm`, then
    `step` here. The new weights arrive while others do what they do: the next program waits, by `before`, for those of
    a bucket when it first computes with them. Whoever else reads weights calls `wait`.
    """

    def __init__(
        self,
        reducer: GradientReducer,
        update: OptimizerUpdate,
        first_use: Sequence[int],
        bucket_order: Sequence[int],
        recorder: SpanRecorder,
    ) -> None:
        """`needed_from`: of each bucket, this rank's first instruction that computes with it (`uses.first_use`).

        `order`: the buckets' numbers as they are updated and handed out, equal on all ranks that share them.
        """
        self.reducer = reducer
        self.step_count = 0
        """Taken so far. Whoever loads a state sets it."""
        self._update = update
        self._needed_from = tuple(first_use)
        self._order = tuple(bucket_order)
        self._arriving: dict[int, AsyncWork[None]] = {}
        self._recorder = recorder

    def set_schedule(self, first_use: Sequence[int], last_use: Sequence[int]) -> None:
        """Another program runs from the next step on; of each bucket, the instructions that matter there.

        Weights that are on their way arrive as the new one needs them.
        """
        self._needed_from = tuple(first_use)
        self.reducer.set_schedule(last_use)

    @torch.no_grad()
    def step(self, rate: float, grad_scale: float = 1.0) -> None:
        """Update every owned shard by its gradients times `factor`, and start to hand the weights out."""
        self.step_count += 1
        if grad_scale != 1.0:
            self.reducer.scale_gradients(grad_scale)
        for number in self._order:
            bucket = self.reducer.buckets[number]
            for part, decays in bucket.slices_by_weight_decay():
                state = (bucket.master_n, bucket.grad_n, bucket.exp_avg_n, bucket.exp_avg_sq_n)
                self._update(*(tensor[part] for tensor in state), rate=rate, step=self.step_count, decays=decays)
            self._hand_out(number)

    def before_instruction(self, instruction: int) -> None:
        """See `pipeline.executor.Listener`: wait for the weights that the instruction computes with."""
        due = [number for number in self._arriving if self._needed_from[number] <= instruction]
        if due:
            with self._recorder.span(TimelineTrack.INSTRUCTION, GRADIENT_SYNC_WAIT):
                for number in due:
                    self._arriving.pop(number).wait()

    def after_instruction(self, instruction: int) -> None:
        """See `pipeline.executor.Listener`: start to reduce what is final."""
        self.reducer.after_instruction(instruction)

    def wait_for_weights(self) -> None:
        """Until all weights are here. Raises `CollectiveError`."""
        while self._arriving:
            self._arriving.popitem()[1].wait()

    def local_shards(self) -> Iterator[ParameterShard]:
        """The optimizer's state here, parameter by parameter, whatever the layout. Write, `publish`, then train on."""
        for bucket in self.reducer.buckets:
            yield from bucket.local_shards()

    def all_gather_weights(self) -> None:
        """Collective: make the weights everywhere what the masters are."""
        for number in self._order:
            self._hand_out(number)
        self.wait_for_weights()

    def warm_up_collectives(self) -> None:
        """Collective: reduce gradients of zero and gather the weights as they are, each bucket as in a step.

        A communicator of NCCL connects the ring, tree or switch of an algorithm when a collective first uses it, and
        blocks the host until all its ranks do. The size of a collective decides its algorithm: so whole buckets.
        Before the first step; gradients are zero afterwards.
        """
        self.reducer.begin_step()
        self.reducer.finish_reduction()
        self.all_gather_weights()

    def close(self) -> None:
        """End what runs the collectives."""
        self.reducer.async_communicator.close()

    def _hand_out(self, number: int) -> None:
        bucket = self.reducer.buckets[number]
        bucket.cast_masters_to_weights()
        what, gather = f"weights, {bucket.name}", bucket.group.all_gather
        count_shard_traffic(self.reducer.traffic, ALL_GATHER, bucket.group, bucket.weights_GN)
        pending = self.reducer.async_communicator.submit(
            what, lambda: gather(bucket.weights_GN, what), (bucket.weights_N,)
        )
        self._arriving[number] = pending
