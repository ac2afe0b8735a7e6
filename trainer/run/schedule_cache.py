"""Executor of the current step's program, rebuilt when the batch ramp changes the number of micro-batches."""

from collections.abc import Callable, Iterable

from ...parallelism.pipeline.executor import PipelineExecutor
from ...parallelism.pipeline.liveness import first_use, last_use
from ...parallelism.zero.optimizer import ShardedOptimizer


class ScheduleCache:
    """Cache of one executor; tells the optimizer when the program changes."""

    def __init__(
        self,
        build: Callable[[int], PipelineExecutor],
        executor: PipelineExecutor,
        optimizer: ShardedOptimizer,
        bucket_stages: Iterable[tuple[int, ...]],
    ) -> None:
        """Cache `executor`, whose program `optimizer` has been given.

        `build` makes an executor for a number of micro-batches; `bucket_stages` are the stages that compute with each
        bucket of the optimizer.
        """
        self.current_executor = executor
        self._build = build
        self._optimizer = optimizer
        self._bucket_stages = tuple(bucket_stages)

    def executor_for(self, micro_batches: int) -> PipelineExecutor:
        """Return the executor of a step of `micro_batches` micro-batches; free if the number has not changed."""
        # One executor is enough: a batch ramp only grows, so an old program never comes back.
        if micro_batches != self.current_executor.program.num_micro_batches:
            self.current_executor = self._build(micro_batches)
            program, rank = self.current_executor.program, self.current_executor.pp_rank
            # The optimizer overlaps its communication with instructions by index: reduce after the last use of a
            # bucket, wait for its weights before the first. Another program has other indices.
            self._optimizer.set_schedule(
                first_use=[first_use(program, rank, users) for users in self._bucket_stages],
                last_use=[last_use(program, rank, users) for users in self._bucket_stages],
            )
        return self.current_executor
