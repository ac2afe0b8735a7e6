"""The program of a step: another one where the batch has grown, as it has more micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ...parallelism.pipeline.executor import PipelineExecutor
from ...parallelism.pipeline.liveness import first_use, last_use
from ...parallelism.zero.optimizer import ShardedOptimizer


class ScheduleCache:
    """What runs the steps of one rank, and keeps the optimizer informed of what runs."""

    def __init__(
        self,
        build: Callable[[int], PipelineExecutor],
        executor: PipelineExecutor,
        optimizer: ShardedOptimizer,
        bucket_stages: Iterable[tuple[int, ...]],
    ) -> None:
        """`build` makes what runs so many micro-batches; `executor` is what `optimizer` follows now.

        `users`: of each bucket of the optimizer, the stages that compute with it.
        """
        self.current_executor = executor
        self._build = build
        self._optimizer = optimizer
        self._users = tuple(bucket_stages)

    def executor_for(self, micro_batches: int) -> PipelineExecutor:
        """What runs a step of so many micro-batches. The same number as in the step before costs nothing."""
        if micro_batches != self.current_executor.program.num_micro_batches:
            self.current_executor = self._build(micro_batches)
            program, rank = self.current_executor.program, self.current_executor.pp_rank
            self._optimizer.set_schedule(
                first_use=[first_use(program, rank, users) for users in self._users],
                last_use=[last_use(program, rank, users) for users in self._users],
            )
        return self.current_executor
