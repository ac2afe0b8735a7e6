"""ZeRO-1 (arXiv 1910.02054): each rank updates its shard of every bucket, then all ranks all-gather the weights."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...comm.async_comm import AsyncWork, build_async_communicator
from ...comm.groups import Group
from ...comm.topology import Topology
from ...comm.trace import GRADIENT_SYNC_WAIT, NULL_RECORDER, SpanRecorder, TimelineTrack
from ...comm.traffic import TrafficCounter
from .bucket import Bucket, BucketParameter, ParameterShard
from .reduce import ALL_GATHER, GradientReducer, count_shard_traffic


class OptimizerUpdate(Protocol):
    """Element-wise update rule of an optimizer, in place."""

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
        """Update the elements; `step` counts from 1, `decays` says whether weight decay applies to them."""
        ...


class ShardedOptimizer:
    """Optimizer over the master weights and moments of one rank's shards.

    A step is `reducer.begin_step`, a program with `before_instruction` and `after_instruction`,
    `reducer.finish_reduction`, then `step`. The all-gathers of the new weights overlap with the next program, which
    waits for a bucket at its first use. Other readers of weights call `wait_for_weights` first.
    """

    def __init__(
        self,
        reducer: GradientReducer,
        update: OptimizerUpdate,
        first_use: Sequence[int],
        bucket_order: Sequence[int],
        recorder: SpanRecorder = NULL_RECORDER,
    ) -> None:
        """Take for each bucket this rank's first instruction that uses it (`liveness.first_use`).

        `bucket_order` is the order in which buckets are updated and all-gathered; ranks that share buckets must agree.
        """
        self.reducer = reducer
        self.step_count = 0
        """Number of steps taken; loading a checkpoint sets it."""
        self._update = update
        self._first_use = tuple(first_use)
        self._order = tuple(bucket_order)
        self._gathering: dict[int, AsyncWork[None]] = {}
        self._recorder = recorder

    @staticmethod
    def over_parameters(
        named_parameters: Iterable[tuple[str, Tensor]],
        group: Group,
        update: OptimizerUpdate,
        *,
        moments_dtype: torch.dtype | None = None,
        has_weight_decay: Callable[[str, Tensor], bool] = lambda name, parameter: parameter.dim() >= 2,
    ) -> "ShardedOptimizer":
        """Shard the state of parameters that are equal on all ranks of `group`, one bucket per dtype.

        They and their `.grad` become views of the buckets, so that `reducer.begin_step` takes the place of `zero_grad`.
        Without a program a step is: `reducer.begin_step`, any number of backwards, `reducer.finish_reduction`, `step`,
        `wait_for_weights`. Gradients are summed: for a mean, `grad_scale` is 1 / ranks. Masters are FP32 at least;
        `moments_dtype` is by default theirs.
        """
        members: dict[torch.dtype, list[BucketParameter]] = {}
        for name, parameter in named_parameters:
            wanted = BucketParameter(name, parameter, has_weight_decay(name, parameter))
            members.setdefault(parameter.dtype, []).append(wanted)
        buckets = [
            Bucket(str(dtype), each, group, moments_dtype or torch.promote_types(dtype, torch.float32), dtype)
            for dtype, each in members.items()
        ]
        worker = build_async_communicator(group, buckets[0].weights_N.device, track=TimelineTrack.REDUCE)
        unused = [0] * len(buckets)
        reducer = GradientReducer(buckets, unused, worker, TrafficCounter(Topology(), group.rank))
        return ShardedOptimizer(reducer, update, unused, range(len(buckets)))

    def set_schedule(self, first_use: Sequence[int], last_use: Sequence[int]) -> None:
        """Set the first and last use of each bucket in the program of the next step.

        All-gathers in flight are waited for at the new first use.
        """
        self._first_use = tuple(first_use)
        self.reducer.set_schedule(last_use)

    @torch.no_grad()
    def step(self, rate: float, grad_scale: float = 1.0) -> None:
        """Update every local shard by its gradients times `grad_scale`, and start the all-gathers of the weights."""
        self.step_count += 1
        if grad_scale != 1.0:
            self.reducer.scale_gradients(grad_scale)
        for number in self._order:
            bucket = self.reducer.buckets[number]
            for part, decays in bucket.slices_by_weight_decay():
                state = (bucket.master_n, bucket.grad_n, bucket.exp_avg_n, bucket.exp_avg_sq_n)
                self._update(*(tensor[part] for tensor in state), rate=rate, step=self.step_count, decays=decays)
            # Bucket by bucket: the first all-gathers overlap with the updates of later buckets.
            self._hand_out(number)

    def before_instruction(self, instruction: int) -> None:
        """Wait for the weights that the instruction uses (`InstructionListener`)."""
        due = [number for number in self._gathering if self._first_use[number] <= instruction]
        if due:
            with self._recorder.span(TimelineTrack.INSTRUCTION, GRADIENT_SYNC_WAIT):
                for number in due:
                    self._gathering.pop(number).wait()

    def after_instruction(self, instruction: int) -> None:
        """Start the reduction of buckets that are final (`InstructionListener`)."""
        self.reducer.after_instruction(instruction)

    def wait_for_weights(self) -> None:
        """Wait for all weights. Raises `CollectiveError`."""
        while self._gathering:
            self._gathering.popitem()[1].wait()

    def local_shards(self) -> Iterator[ParameterShard]:
        """Yield the optimizer state of this rank by parameter. After writing into it, call `all_gather_weights`."""
        for bucket in self.reducer.buckets:
            yield from bucket.local_shards()

    def all_gather_weights(self) -> None:
        """Cast the masters to weights and all-gather them on all ranks. Collective."""
        for number in self._order:
            self._hand_out(number)
        self.wait_for_weights()

    def warm_up_collectives(self) -> None:
        """Reduce zero gradients and all-gather the weights, each bucket as in a step. Collective.

        Call before the first step; gradients are zero afterwards.
        """
        # NCCL connects the ring, tree or switch of an algorithm when a collective first uses it, and blocks the host
        # until all ranks of the communicator do. In a step, where some of them wait for messages of the blocked rank,
        # that can deadlock. The size of a collective decides its algorithm, hence whole buckets.
        self.reducer.begin_step()
        self.reducer.finish_reduction()
        self.all_gather_weights()

    def close(self) -> None:
        """Stop the thread or stream of the collectives."""
        self.reducer.async_communicator.close()

    def _hand_out(self, number: int) -> None:
        bucket = self.reducer.buckets[number]
        bucket.cast_masters_to_weights()
        what, gather = f"weights, {bucket.name}", bucket.group.all_gather
        count_shard_traffic(self.reducer.traffic, ALL_GATHER, bucket.group, bucket.weights_GN)
        pending = self.reducer.async_communicator.submit(
            what, lambda: gather(bucket.weights_GN, what), (bucket.weights_N,)
        )
        self._gathering[number] = pending
